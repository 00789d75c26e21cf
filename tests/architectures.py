"""Tiny random checkpoints of every architecture, shared by the whole test suite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

VOCAB, CONTEXT, WINDOW = 96, 128, 8


def base(**changes: Any) -> dict[str, Any]:
    """Two layers, 4 query and 2 key heads of 16 dims."""
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    return {**values, **changes}


def rope(kind: str, theta: float = 10000.0, **more: Any) -> dict[str, Any]:
    """rope_parameters of a scaling."""
    return {"rope_type": kind, "rope_theta": theta, **more}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=32)
LONGROPE = rope(
    "longrope",
    short_factor=[1.0 + 0.05 * i for i in range(8)],
    long_factor=[1.5 + 0.5 * i for i in range(8)],
    original_max_position_embeddings=24,
)

ARCHITECTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**base(attention_bias=True, mlp_bias=True)),
    "llama-tied": lambda: LlamaConfig(**base(tie_word_embeddings=True, num_key_value_heads=1)),
    "llama-llama3": lambda: LlamaConfig(**base(rope_parameters=LLAMA3)),
    "llama-linear": lambda: LlamaConfig(**base(rope_parameters=rope("linear", factor=4.0))),
    "llama-dynamic": lambda: LlamaConfig(
        **base(rope_parameters=rope("dynamic", factor=4.0), max_position_embeddings=CONTEXT // 2)
    ),
    "llama-yarn": lambda: LlamaConfig(**base(rope_parameters=YARN)),
    "qwen2": lambda: Qwen2Config(
        **base(use_sliding_window=True, sliding_window=WINDOW, layer_types=["full_attention", "sliding_attention"])
    ),
    "qwen3": lambda: Qwen3Config(**base(head_dim=24)),
    "mistral": lambda: MistralConfig(**base(sliding_window=WINDOW, head_dim=16)),
    "gemma2": lambda: Gemma2Config(
        **base(
            head_dim=16,
            sliding_window=WINDOW,
            query_pre_attn_scalar=20,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
            tie_word_embeddings=True,
        )
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **base(
            head_dim=16,
            sliding_window=WINDOW,
            num_hidden_layers=3,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters={
                "full_attention": rope("linear", theta=1e6, factor=8.0),
                "sliding_attention": rope("default", theta=1e4),
            },
            tie_word_embeddings=True,
        )
    ),
    "phi3": lambda: Phi3Config(**base(sliding_window=None, partial_rotary_factor=0.5)),
    "phi3-longrope": lambda: Phi3Config(
        **base(rope_parameters=LONGROPE, sliding_window=None, original_max_position_embeddings=24)
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    ),
    "opt": lambda: OPTConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        word_embed_proj_dim=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        rope_parameters=rope("default", partial_rotary_factor=0.5),
        bos_token_id=1,
        eos_token_id=2,
    ),
    "stablelm": lambda: StableLmConfig(
        **base(
            rope_parameters=rope("default", partial_rotary_factor=0.25), qk_layernorm=True, use_parallel_residual=True
        )
    ),
    "olmo2": lambda: Olmo2Config(**base()),
    "granite": lambda: GraniteConfig(
        **base(embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.3)
    ),
    "starcoder2": lambda: Starcoder2Config(**base(sliding_window=WINDOW, tie_word_embeddings=True)),
    "smollm3": lambda: SmolLM3Config(**base(num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0])),
    "cohere2": lambda: Cohere2Config(
        **base(
            sliding_window=WINDOW,
            num_hidden_layers=4,
            layer_types=["sliding_attention"] * 3 + ["full_attention"],
            logit_scale=0.25,
            tie_word_embeddings=True,
        )
    ),
    "mixtral": lambda: MixtralConfig(**base(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **base(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=48, decoder_sparse_step=1, head_dim=16)
    ),
    "gpt_oss": lambda: GptOssConfig(
        **base(
            num_local_experts=4,
            num_experts_per_tok=2,
            head_dim=16,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters=rope(
                "yarn", theta=150000.0, factor=8.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
                original_max_position_embeddings=16,
            ),
        )
    ),
}  # fmt: skip


def make_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A random model whose norms, biases and sinks are not their neutral defaults, so that each one counts."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            scale = 0.3 if parameter.dim() < 2 else 0.5 * parameter.shape[-1] ** -0.5
            offset = parameter if parameter.dim() < 2 else 0.0
            parameter.copy_(offset + noise * scale)
        model.tie_weights()
    return model


def make_checkpoint(name: str, path: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Path:
    """Save a random checkpoint of an architecture, its config changed, as safetensors at ``path``; returns it."""
    config = ARCHITECTURES[name]()
    config.update(changes)
    make_model(config, dtype, seed).save_pretrained(path)
    return path
