"""The tensors a config asks for, by the names a checkpoint gives them; no weights are made."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from llmopt.errors import ConfigError, UnsupportedModelError
from llmopt.frontend.checkpoint import Checkpoint
from llmopt.frontend.model import build_model
from llmopt.frontend.names import aliases
from llmopt.frontend.quantized import KEY
from llmopt.registry import did_you_mean

DTYPES = ("bfloat16", "float16", "float32")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers")


@dataclass(frozen=True)
class Blueprint:
    """Shapes and dtypes of a checkpoint's tensors, and its config.

    ``small``: the model's own initialization of tensors with at most one axis (norms, biases, sinks), fp32.
    ``spread``: standard deviation of the others.
    """

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    small: dict[str, npt.NDArray[np.float32]]
    spread: float

    @staticmethod
    def of(config: Mapping[str, Any], dtype: str | None = None) -> Blueprint:
        """Build the config's decoder on meta. Raises UnsupportedModelError, CheckpointError or ConfigError."""
        if config.get(KEY) is not None:
            raise UnsupportedModelError("the shapes of quantized weights are known from their files alone", where=KEY)
        dtype = dtype or str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        if dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {dtype!r}", hint=did_you_mean(dtype, DTYPES))
        raw = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": dtype}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            (path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
            model = build_model(Checkpoint(path, raw, {}, {}, {}), getattr(torch, dtype))
        small = initialized_small(model)
        tied = aliases(model)
        state = {name: value for name, value in model.state_dict().items() if name not in tied}
        stored = revert_weight_conversion(model, dict(state))
        return Blueprint(
            raw | {"architectures": [type(model).__name__]},
            {name: tuple(value.shape) for name, value in sorted(stored.items())},
            {name: str(value.dtype).removeprefix("torch.") for name, value in stored.items()},
            {name: value for name, value in small.items() if name in stored and name in state},
            float(getattr(model.config.get_text_config(), "initializer_range", None) or 0.02),
        )


def initialized_small(model: PreTrainedModel) -> dict[str, npt.NDArray[np.float32]]:
    """Tensors of at most one axis as the model's own code initializes them (0 where it does not)."""
    found: dict[str, npt.NDArray[np.float32]] = {}
    for path, module in model.named_modules():
        mine = {n: p for n, p in module._parameters.items() if p is not None and p.dim() <= 1}
        if not mine:
            continue
        kept = dict(module._parameters)
        module._parameters.update({n: torch.nn.Parameter(torch.zeros(p.shape)) for n, p in mine.items()})
        torch.manual_seed(0)
        with torch.no_grad():
            model._init_weights(module)  # type: ignore[no-untyped-call]
        for name in mine:
            value = module._parameters[name]
            assert value is not None
            found[f"{path}.{name}".lstrip(".")] = value.detach().float().numpy()
        module._parameters.update(kept)
    return found


def known_shapes() -> dict[str, dict[str, Any]]:
    """Configs of well-known models by name."""
    text = resources.files("llmopt.frontend").joinpath("shapes.json").read_text("utf-8")
    return dict(json.loads(text))


def named_config(name: str) -> dict[str, Any]:
    """The config of a known shape; raises ConfigError with the nearest name."""
    shapes = known_shapes()
    if name not in shapes:
        raise ConfigError(f"unknown shape {name!r}", hint=did_you_mean(name, shapes))
    return shapes[name]


def with_layers(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The config with another number of layers; lists with one entry a layer are cut or repeated."""
    key = next((k for k in LAYERS if k in config), None)
    if key is None or count < 1:
        raise ConfigError(
            f"cannot make it {count} layers", hint="the config names its layers by none of " + str(LAYERS)
        )
    before = config[key]
    changed = dict(config) | {key: count}
    for name, value in config.items():
        if isinstance(value, list) and len(value) == before and before > 1:
            changed[name] = [value[i % before] for i in range(count)]
    return changed
