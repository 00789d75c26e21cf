"""The transformers model of a checkpoint, on ``meta``, with its weights found in the shards."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from llmopt.errors import CheckpointError, ConfigError, UnsupportedModelError
from llmopt.frontend.checkpoint import Checkpoint
from llmopt.ir.module import ModelConfig

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def build_model(checkpoint: Checkpoint, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model on meta in ``dtype`` (None: the checkpoint's).

    Raises UnsupportedModelError for an architecture transformers does not know or that is no decoder.
    """
    where = str(checkpoint.path / "config.json")
    kind = checkpoint.config["model_type"]
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else repr(error)
        if "does not recognize this architecture" in str(error) or isinstance(error, KeyError):
            raise UnsupportedModelError(f"unknown architecture {kind!r}", where=where) from error
        raise CheckpointError(f"config is not a valid {kind} config: {first}", where=where) from error
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{kind} is an encoder-decoder, not a decoder", where=where)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights' own affair: the modules are built as if they were not quantized
    dtype = dtype or storage_dtype(checkpoint)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype, trust_remote_code=False
            )
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else repr(error)
        raise UnsupportedModelError(f"no decoder can be built for {kind!r}: {first}", where=where) from error
    keep_in_fp32(model, dtype)
    return model.eval()  # type: ignore[no-any-return]


def keep_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Apply the model's own list of tensors that stay in fp32, as from_pretrained does."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if dtype == torch.float32 or not kept:
        return
    for path, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for leaf, value in store.items():
                name = f"{path}.{leaf}".split(".")
                if value is not None and value.is_floating_point() and kept & set(name):
                    value.data = value.data.float()


def storage_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The config's dtype, else the one most weights are stored in."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    for dtype in FLOATS:
        if named == str(dtype).removeprefix("torch."):
            return dtype
    sizes = {d: sum(w.nbytes for w in checkpoint.weights.values() if w.dtype == d) for d in FLOATS}
    return max(FLOATS, key=lambda d: sizes[d])


def model_config(checkpoint: Checkpoint, model: PreTrainedModel, max_context: int | None) -> ModelConfig:
    """Vocabulary, context length and special tokens; raises ConfigError when ``max_context`` exceeds the model's."""
    text = model.config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if max_context is not None and max_context < 1:
        raise ConfigError(f"max_context is {max_context}, at least 1 is needed")
    longest = stretched_limit(text, limit)
    if max_context is not None and longest is not None and max_context > longest:
        raise ConfigError(
            f"max_context {max_context} exceeds the model's {longest} positions", where=str(checkpoint.path)
        )
    if max_context is None and limit is None:
        raise ConfigError("the model names no longest context", hint="give max_context")
    eos = checkpoint.generation_config.get("eos_token_id", getattr(text, "eos_token_id", None))
    bos = checkpoint.generation_config.get("bos_token_id", getattr(text, "bos_token_id", None))
    eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),)
    return ModelConfig(int(text.vocab_size), int(max_context or limit or 0), eos_ids, bos, checkpoint.config)


def stretched_limit(config: Any, limit: int | None) -> int | None:
    """Longest context that may be asked for: dynamic scaling stretches the positions by its factor."""
    rope = getattr(config, "rope_parameters", None) or {}
    if limit and rope.get("rope_type") == "dynamic":
        return int(limit * max(1.0, float(rope.get("factor") or 1.0)))
    return limit


def computed_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """Real values of the buffers no checkpoint holds, computed by the model's own initialization.

    Raises UnsupportedModelError for a buffer that initialization leaves unset.
    """
    values: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        mine = [
            n for n in module._buffers if n in module._non_persistent_buffers_set and module._buffers[n] is not None
        ]
        if not mine or not all(module._buffers[n].is_meta for n in mine):
            continue
        trial = initialized(model, module, 0.5), initialized(model, module, 0.25)
        for name in mine:
            first, second = (t._buffers[name] if t else None for t in trial)
            if first is None or second is None or not torch.equal(first, second):
                raise UnsupportedModelError(
                    f"buffer {name} is in no checkpoint and cannot be recomputed",
                    where=f"{path} ({type(module).__name__})",
                )
            values[f"{path}.{name}"] = first
    return values


def initialized(model: PreTrainedModel, module: nn.Module, fill: float) -> nn.Module | None:
    """A copy of a module (no children, parameters on meta, buffers filled), initialized by the model's code."""
    trial = copy.copy(module)
    trial._modules = {}
    trial._buffers = {
        n: None if b is None else torch.full(b.shape, fill).to(b.dtype) for n, b in module._buffers.items()
    }
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        with torch.no_grad():
            model._init_weights(trial)  # type: ignore[no-untyped-call]
    except (AttributeError, TypeError, RuntimeError, KeyError):
        return None
    finally:
        logging.set_verbosity(verbosity)
    return trial
