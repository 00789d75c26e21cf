"""The manifest: what an artifact is, where it came from, and the digest of everything in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, TypedDict

from llmopt.artifact.digest import sha256
from llmopt.errors import ArtifactError
from llmopt.program import StatePlan

FORMAT = 1
"""Version of the directory's layout; another number is refused."""


class Golden(TypedDict):
    """A greedy continuation every executor must reproduce.

    ``margins``: gap between the best and the second logit before each token; a token whose margin is within
    the dtype's noise cannot be held against an executor.
    """

    prompt: list[int]
    tokens: list[int]
    margins: list[float]


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and hex sha256 of a file."""

    bytes: int
    sha256: str


Fill = tuple[Literal["normal", "uniform", "integers"], float, float]
"""How a random tensor is drawn: (mean, standard deviation), or the half-open range [low, high)."""


@dataclass(frozen=True)
class RandomTensor:
    """A tensor that is generated at load."""

    dtype: str
    shape: tuple[int, ...]
    fill: Fill


@dataclass(frozen=True)
class WeightsEntry:
    """Where the weights are and what they must be.

    ``embedded`` and ``external``: weights.safetensors, inside or in a directory given at load. ``random``: the
    tensors of ``random`` are drawn from ``seed``; the small rest is in weights.safetensors. ``digest`` is the
    sha256 over the raw sha256 digests of the file's chunks of ``chunk_bytes``.
    """

    kind: Literal["embedded", "external", "random"]
    bytes: int
    digest: str
    chunk_bytes: int
    chunks: tuple[str, ...]
    seed: int = 0
    random: dict[str, RandomTensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """Everything a runtime needs to know before it reads the program.

    ``versions``: llmopt and the libraries that built it. ``source``: digest of the checkpoint. ``dtype``: compute
    dtype. ``dims``: symbolic dims with (min, max). ``states``: the KV plan, one entry a state group, bytes per
    block included. ``accuracy``: what quantizing cost on held-out text (empty: not measured). ``notes``: what the
    target wants its executor to know. ``files``: every file except the manifest and the weights.
    """

    model: str
    target: str
    dtype: str
    source: str
    versions: dict[str, str]
    dims: dict[str, tuple[int, int]]
    states: list[dict[str, Any]]
    entry_points: dict[str, str]
    max_context: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    golden: list[Golden]
    notes: dict[str, Any]
    files: dict[str, FileEntry]
    weights: WeightsEntry
    accuracy: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> str:
        """Canonical text, ending with a digest of itself: the same manifest always gives the same bytes."""
        body = asdict(self)
        return _render({**body, "digest": sha256(_render(body).encode())})

    @staticmethod
    def from_json(text: str) -> Manifest:
        """Inverse of to_json. Raises ArtifactError when the text is of another format or was changed."""
        try:
            raw = json.loads(text)
            version = raw["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"not a manifest: {error}", where="manifest.json") from error
        if version != FORMAT:
            hint = "recompile the model, or use the llmopt that built it"
            raise ArtifactError(f"expected format {FORMAT}, found {version}", where="manifest.json", hint=hint)
        try:
            digest = raw.pop("digest", None)
            found = sha256(_render(raw).encode())
            if digest != found or _render({**raw, "digest": digest}) != text:
                raise ArtifactError(f"expected sha256 {digest}, found {found}", where="manifest.json")
            return _decode(raw)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"malformed: {error!r}", where="manifest.json") from error

    def with_golden(self, golden: list[Golden]) -> Manifest:
        """A copy with golden tokens."""
        return replace(self, golden=golden)


def describe_states(plan: StatePlan) -> list[dict[str, Any]]:
    """The KV plan as the manifest keeps it: bytes are per block, over all layers of the group."""
    return [
        {
            "name": group.name,
            "kind": group.kind,
            "block_size": group.block_size,
            "block_bytes": group.block_bytes(),
            "layers": sorted({spec.layer for spec in group.states}),
            "dtypes": sorted({spec.dtype for spec in group.states}),
            "window": group.window,
            "sinks": group.sinks,
        }
        for group in plan.groups
    ]


def _render(body: Mapping[str, Any]) -> str:
    return json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _decode_weights(raw: Mapping[str, Any]) -> WeightsEntry:
    random = {
        name: RandomTensor(t["dtype"], tuple(t["shape"]), (t["fill"][0], t["fill"][1], t["fill"][2]))
        for name, t in raw["random"].items()
    }
    return WeightsEntry(**{**raw, "chunks": tuple(raw["chunks"]), "random": random})


def _decode(raw: Mapping[str, Any]) -> Manifest:
    if unknown := set(raw) - {f.name for f in fields(Manifest)}:
        raise ValueError(f"unknown keys {sorted(unknown)}")
    return Manifest(
        **{
            **raw,
            "dims": {name: (low, high) for name, (low, high) in raw["dims"].items()},
            "eos_token_ids": tuple(raw["eos_token_ids"]),
            "files": {name: FileEntry(**entry) for name, entry in raw["files"].items()},
            "weights": _decode_weights(raw["weights"]),
        }
    )
