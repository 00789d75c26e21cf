"""Which stored tensors each parameter of the model is made of, by transformers' own renaming and merging rules."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from llmopt.errors import CheckpointError, UnsupportedModelError
from llmopt.frontend.checkpoint import Checkpoint
from llmopt.frontend.shards import Stored
from llmopt.ir.weights import Cast, Concat, ConcatColumns, Stack, Transposed, Weight

Pieces = dict[str, list[Weight]]
Found = dict[str, tuple[str, Weight]]
COMPARE_BYTES = 1 << 24


def find_weights(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, tuple[str, Weight]]:
    """(table name, weight) of each parameter and persistent buffer of the model, in the model's dtype.

    A tensor used as it is stored keeps its name in the file; a merged one takes the parameter's.
    Raises CheckpointError on missing tensors and shapes that contradict the config.
    """
    state = model.state_dict()
    found = convert(checkpoint, model, state)
    settle_ties(model, found)
    missing = sorted(set(state) - set(found))
    if missing:
        raise CheckpointError(
            f"tensor {missing[0]} is missing" + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""),
            where=str(checkpoint.path),
            hint=f"{type(model).__name__} needs it",
        )
    weights: dict[str, tuple[str, Weight]] = {}
    for name in sorted(state):
        stored, weight = found[name]
        check_shape(name, stored, weight, tuple(state[name].shape))
        dtype = state[name].dtype
        weights[name] = (stored, weight if weight.dtype == dtype else Cast(weight, dtype))
    return weights


def settle_ties(model: PreTrainedModel, found: Found) -> None:
    """Give tied parameters one weight, from whichever name the checkpoint holds.

    Where it holds both with different values the config is wrong, and the two are untied, as transformers does.
    """
    for alias, owner in aliases(model).items():
        if alias not in found and owner in found:
            found[alias] = found[owner]
        elif owner not in found and alias in found:
            found[owner] = found[alias]
        elif owner in found and same_values(found[alias][1], found[owner][1]):
            found[alias] = found[owner]
        elif owner in found:
            parent, _, leaf = alias.rpartition(".")
            module = model.get_submodule(parent)
            tied = module._parameters[leaf]
            module._parameters[leaf] = nn.Parameter(torch.empty_like(tied), requires_grad=False)  # type: ignore[arg-type]


def same_values(a: Weight, b: Weight) -> bool:
    """Whether two weights hold equal tensors; reads both in chunks, up to the first difference."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return all(torch.equal(x, y) for x, y in zip(a.chunks(COMPARE_BYTES), b.chunks(COMPARE_BYTES)))


def aliases(model: PreTrainedModel) -> dict[str, str]:
    """Tied parameters: each name to the one whose tensor it shares."""
    owners: dict[int, str] = {}
    tied: dict[str, str] = {}
    preferred = set(getattr(model, "_tied_weights_keys", None) or ())
    names = sorted(model.named_parameters(remove_duplicate=False), key=lambda item: item[0] in preferred)
    for name, parameter in names:
        owner = owners.setdefault(id(parameter), name)
        if owner != name:
            tied[name] = owner
    return tied


def check_shape(name: str, stored: str, weight: Weight, expected: tuple[int, ...]) -> None:
    """Raise CheckpointError when the stored shape is not the config's."""
    if weight.shape != expected:
        raise CheckpointError(
            f"tensor {stored} is {list(weight.shape)}, the config asks for {list(expected)}",
            where=str(file_of(weight) or name),
        )


def file_of(weight: Weight) -> Path | None:
    """The shard a weight (or its first part) is read from."""
    if isinstance(weight, Stored):
        return weight.file
    for inner in (getattr(weight, "source", None), *getattr(weight, "sources", ())):
        if inner is not None and (file := file_of(inner)):
            return file
    return None


def convert(checkpoint: Checkpoint, model: PreTrainedModel, state: dict[str, Any]) -> Found:
    """Model names to (table name, weight), following the model's conversion mapping."""
    rules = get_model_conversion_mapping(model)
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    found: Found = {}
    merged: dict[str, Pieces] = defaultdict(lambda: defaultdict(list))
    owners: dict[str, WeightConverter] = {}
    for name in sorted(checkpoint.weights, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if pattern is None or name in state:
            target = name if name in state else target
            found.setdefault(target, (name, checkpoint.weights[name]))
        else:
            merged[target][pattern].append(checkpoint.weights[name])
            owners[target] = by_pattern[pattern]
    for target, pieces in merged.items():
        if target not in found and target in state:
            found[target] = (target, merge(owners[target], pieces, target))
    return found


def merge(converter: WeightConverter, pieces: Pieces, target: str) -> Weight:
    """A parameter's lazy weight: the converter's operations, done on weights instead of tensors."""
    parts = {pattern: pieces[pattern] for pattern in converter.source_patterns if pattern in pieces}
    for operation in converter.operations:
        parts = apply(operation, parts, target)
    flat = [w for group in parts.values() for w in group]
    if len(flat) != 1:
        raise CheckpointError(f"tensor {target} has {len(flat)} candidates", where=str(file_of(flat[0])))
    return flat[0]


def apply(operation: Any, parts: Pieces, target: str) -> Pieces:
    """One conversion operation; raises UnsupportedModelError on one with no lazy form."""
    match operation:
        case MergeModulelist(dim=0):
            return {pattern: [Stack(tuple(group))] for pattern, group in parts.items()}
        case Concatenate(dim=dim) if dim in (0, 1):
            flat = tuple(w for group in parts.values() for w in group)
            return {target: [Concat(flat) if dim == 0 else ConcatColumns(flat)]}
        case Transpose(dim0=a, dim1=b, check_dims=False):
            return {pattern: [transposed(w, {a, b}, target) for w in group] for pattern, group in parts.items()}
    raise UnsupportedModelError(f"tensor {target} needs the conversion {operation!r}, which has no streamed form")


def transposed(weight: Weight, axes: set[int], target: str) -> Weight:
    """The last two axes of a weight swapped."""
    rank = len(weight.shape)
    if {axis % rank for axis in axes} != {rank - 2, rank - 1}:
        raise UnsupportedModelError(f"tensor {target} swaps axes {sorted(axes)} of {rank}")
    return Transposed(weight)
