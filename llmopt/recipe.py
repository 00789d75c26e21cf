"""Recipes: strict YAML that names a target, a dtype and the passes with their options."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from llmopt.errors import ConfigError
from llmopt.registry import did_you_mean, load_pass, recipe_path

if TYPE_CHECKING:
    import torch

    from llmopt.ir.pass_manager import Pass


class CalibrationOptions(BaseModel):
    """The text that calibrating passes see, and that the proof of a quantizing build is measured on.

    ``text``: a UTF-8 or .jsonl file (None: the model writes it, when a pass calibrates). ``tokens``: how many tokens to
    calibrate on; an eighth as many are held out. ``window``: tokens a window. ``seed``: of the choice of windows.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    text: str | None = None
    tokens: int = Field(default=32768, ge=2)
    window: int = Field(default=512, ge=2)
    seed: int = Field(default=0, ge=0)


class RecipeFile(BaseModel):
    """The keys of a recipe file. A pass is its name, or one mapping of its name to options.

    ``dequantize``: glob patterns over the names of tensors that the checkpoint stores quantized; these become values.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    target: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_context: int | None = None
    calibration: CalibrationOptions | None = None
    dequantize: list[str] = []
    passes: list[str | dict[str, dict[str, Any] | None]] = []
    target_options: dict[str, Any] = {}


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe. ``passes`` are instances in order; ``text`` is canonical YAML (equal recipes, equal bytes)."""

    name: str
    target: str
    dtype: str
    max_context: int | None
    passes: tuple[Pass, ...]
    target_options: dict[str, Any]
    text: str
    calibration: CalibrationOptions
    dequantize: tuple[str, ...] = ()

    @property
    def torch_dtype(self) -> torch.dtype:
        """The compute dtype as torch spells it."""
        import torch

        return getattr(torch, self.dtype)  # type: ignore[no-any-return]


def load_recipe(path_or_name: str | Path) -> Recipe:
    """A recipe from a file (anything with a suffix or a folder in it) or a built-in name. Raises ConfigError."""
    path = Path(path_or_name)
    if path.suffix not in (".yaml", ".yml") and len(path.parts) == 1:
        path = recipe_path(str(path_or_name))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the recipe: {error}", where=str(path)) from error
    return parse_recipe(text, name=path.stem, where=str(path))


def parse_recipe(text: str, name: str = "recipe", where: str | None = None) -> Recipe:
    """A recipe from YAML text. Raises ConfigError naming ``where`` and the key."""
    where = where or name
    try:
        raw = yaml.load(text, Loader=StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}", where=where) from error
    if not isinstance(raw, dict):
        raise ConfigError("a recipe is a mapping of keys", where=where)
    _check_keys(raw, RecipeFile.model_fields, where)
    try:
        file = RecipeFile.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_first(error), where=where) from error
    if file.max_context is not None and file.max_context < 1:
        raise ConfigError("max_context must be at least 1", where=where)
    entries = [_entry(item, f"{where}, pass {i + 1}") for i, item in enumerate(file.passes)]
    passes = tuple(build_pass(n, options, f"{where}, pass {i + 1}") for i, (n, options) in enumerate(entries))
    canonical = file.model_dump() | {"passes": [{n: dict(sorted(o.items()))} if o else n for n, o in entries]}
    for key in ("calibration", "dequantize"):
        if not canonical[key]:
            del canonical[key]
    dumped = yaml.safe_dump(canonical, sort_keys=True, allow_unicode=True)
    options, calibration = dict(file.target_options), file.calibration or CalibrationOptions()
    return Recipe(
        name,
        file.target,
        file.dtype,
        file.max_context,
        passes,
        options,
        dumped,
        calibration,
        tuple(file.dequantize),
    )


def build_pass(name: str, options: Mapping[str, Any] | None = None, where: str = "recipe") -> Pass:
    """An instance of a pass with validated options. Raises ConfigError."""
    try:
        cls = load_pass(name)
    except ConfigError as error:
        raise ConfigError(error.what, where=where, hint=error.hint) from error
    options = options or {}
    where = f"{where} ({name})"
    known = {f.name: f for f in fields(cls)}
    _check_keys(options, known, where)
    missing = [
        n for n, f in known.items() if n not in options and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing:
        raise ConfigError(f"option {missing[0]!r} is missing", where=where)
    hints = get_type_hints(cls)
    values = {}
    for key, value in options.items():
        value = tuple(value) if isinstance(value, list) else value
        try:
            values[key] = TypeAdapter(hints[key]).validate_python(value, strict=True)
        except ValidationError as error:
            raise ConfigError(f"option {key!r}: {_first(error)}", where=where) from error
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(str(error), where=where) from error


def _entry(item: str | dict[str, dict[str, Any] | None], where: str) -> tuple[str, dict[str, Any]]:
    if isinstance(item, str):
        return item, {}
    if len(item) != 1:
        raise ConfigError("an entry of passes is one name, or one name with its options", where=where)
    name, options = next(iter(item.items()))
    return name, options or {}


def _check_keys(raw: Mapping[Any, Any], known: Any, where: str) -> None:
    for key in raw:
        if key not in known:
            raise ConfigError(f"unknown key {key!r}", where=where, hint=did_you_mean(str(key), known))


def _first(error: ValidationError) -> str:
    detail = error.errors()[0]
    place = ".".join(str(part) for part in detail["loc"])
    return f"{place}: {detail['msg']}" if place else str(detail["msg"])


class StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        mapping: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in mapping:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            mapping[key] = self.construct_object(value_node, deep=deep)
        return mapping
