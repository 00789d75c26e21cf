"""Models outside the interfaces are refused by name; what can be captured without being listed works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedConfig

from llmopt.errors import ConfigError, UnsupportedModelError
from llmopt.frontend import capture, load_checkpoint
from llmopt.frontend.fold import is_index
from llmopt.frontend.hooks import takes_all
from tests.architectures import CONTEXT, VOCAB, WINDOW, base, make_checkpoint, make_model
from tests.frontend.running import captured_logits, eager_model, relative_error


def config(name: str, **values: Any) -> Callable[[], PreTrainedConfig]:
    """A config class of transformers with values."""
    return lambda: getattr(transformers, name)(**values)


REFUSED = {
    # its config names no special tokens
    "cpmant": (
        config(
            "CpmAntConfig",
            vocab_size=VOCAB,
            hidden_size=32,
            num_attention_heads=2,
            dim_head=16,
            dim_ff=64,
            num_hidden_layers=2,
            prompt_types=2,
            segment_types=2,
        ),
        "cpmant.encoder.layers.0.self_att (CpmAntSelfAttentionBlock)",
    ),
    "falcon": (config("FalconConfig", **base()), "transformer.h.0.self_attention (FalconAttention)"),
    "bloom": (
        config("BloomConfig", vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=2),
        "transformer.h.0.self_attention (BloomAttention)",
    ),
    "mpt": (
        config("MptConfig", vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=2, max_seq_len=64),
        "transformer.blocks.0.attn (MptAttention)",
    ),
    "gptj": (
        config("GPTJConfig", vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, rotary_dim=8, n_positions=64),
        "transformer.h.0.attn (GPTJAttention)",
    ),
    "mamba": (
        config("MambaConfig", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2),
        "backbone.layers.0.mixer (MambaMixer)",
    ),
    "jamba": (
        config("JambaConfig", **base(num_experts=2, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False)),
        "model.layers.0.mamba (JambaMambaMixer)",
    ),
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
}
"""Attention over latent keys and values, and experts from the second layer on (DeepSeek)."""
WORKING = {
    "granite_swa": config("GraniteSWAConfig", **base(sliding_window=WINDOW, layer_rope_theta=[1e4, 1e6])),
    # keys and values shared by layers, rows cut off that are wanted here, rotation of one tensor, scales of experts
    "gemma4": config(
        "Gemma4TextConfig",
        **base(
            head_dim=16,
            global_head_dim=32,
            sliding_window=WINDOW,
            num_hidden_layers=4,
            layer_types=["sliding_attention", "full_attention"] * 2,
            num_kv_shared_layers=2,
            attention_k_eq_v=True,
            vocab_size_per_layer_input=VOCAB,
            hidden_size_per_layer_input=16,
            enable_moe_block=True,
            num_experts=4,
            top_k_experts=2,
            moe_intermediate_size=32,
            final_logit_softcapping=3.0,
        ),
    ),
    "phi": config("PhiConfig", **base()),
    # a rotary table of complex numbers
    "deepseek_v2": config(
        "DeepseekV2Config",
        **base(
            **LATENT,
            n_routed_experts=4,
            n_shared_experts=1,
            head_dim=8,
        ),
    ),
    "gpt_bigcode": config("GPTBigCodeConfig", vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=CONTEXT),
    "nemotron": config("NemotronConfig", **base()),
    "deepseek_v3": config(
        "DeepseekV3Config",
        **base(
            **LATENT,
            n_routed_experts=8,
            n_group=2,
            topk_group=1,
        ),
    ),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_by_name(name: str, tmp_path: Path) -> None:
    build, module = REFUSED[name]
    make_model(build()).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError) as caught:
        capture(load_checkpoint(tmp_path), max_context=64)
    assert caught.value.exit_code == 5
    assert str(caught.value).startswith(module + ": "), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(WORKING))
def test_works_unlisted(name: str, tmp_path: Path) -> None:
    make_model(WORKING[name]()).save_pretrained(tmp_path)
    module = capture(load_checkpoint(tmp_path)).module
    model = eager_model(tmp_path)
    for length in (1, 2, 30):
        ids = torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            expected = model(ids).logits
        assert relative_error(captured_logits(module, ids), expected) <= 1e-5


def test_encoder_decoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')
    make_checkpoint("llama", tmp_path / "weights")
    (tmp_path / "weights" / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        capture(load_checkpoint(tmp_path))


@pytest.mark.parametrize(("asked", "said"), [(0, "at least 1"), (CONTEXT + 1, "exceeds")])
def test_context_limits(asked: int, said: str, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(make_checkpoint("gpt2", tmp_path))
    with pytest.raises(ConfigError, match=said):
        capture(checkpoint, max_context=asked)


@pytest.mark.parametrize("context", [1, 5])
def test_short_contexts_compile(context: int, tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path)
    module = capture(load_checkpoint(path), max_context=context).module
    assert module.dims == {"T": (1, context)}
    with torch.no_grad():
        expected = eager_model(path)(torch.full((1, context), 5)).logits
    assert relative_error(captured_logits(module, torch.full((1, context), 5)), expected) <= 1e-5


def test_slices_that_take_everything() -> None:
    for whole in (slice(None), slice(0, None), (slice(None), slice(0, None, 1))):
        assert takes_all(whole)
    for part in (slice(1, None), slice(None, 5), slice(None, None, 2), (slice(None), 0), (slice(None), None), ...):
        assert not takes_all(part)


def test_only_what_is_an_index_already_looks_a_vector_up() -> None:
    """A mask, or a number that may be negative, is none."""

    def step(ids: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, ...]:
        chosen = scores.topk(2)[1]
        return ids.view(-1), chosen.view(-1), scores.topk(2)[0], ids - 1, scores > 0

    graph = torch.fx.experimental.proxy_tensor.make_fx(step)(torch.ones(2, 3).long(), torch.ones(2, 4)).graph
    outputs = next(iter(graph.find_nodes(op="output"))).args[0]
    assert [is_index(node) for node in outputs] == [True, True, False, False, False]
