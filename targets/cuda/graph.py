"""A function's calls as a rule that joins them sees them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from llmopt.program import Function, OpCall, Ref, TensorType


@dataclass
class Graph:
    """A function's calls under one rule: who makes a value, who reads it, and what takes each call's place."""

    function: Function

    def __post_init__(self) -> None:
        self.calls = self.function.calls
        self.types: dict[str, TensorType] = {}
        self.places: list[tuple[OpCall, ...]] = [(call,) for call in self.calls]
        self.maker = {name: i for i, call in enumerate(self.calls) for name in call.outputs}
        self.uses = Counter(name for call in self.calls for name in call.refs())
        self.uses.update((*self.function.outputs, *self.function.state_outputs.values()))
        self.readers: dict[str, list[int]] = {}
        for i, call in enumerate(self.calls):
            for name in call.refs():
                self.readers.setdefault(name, []).append(i)

    def only_from(self, arg: Any, *ops: str) -> int | None:
        """Index of the call, one of ``ops``, whose result nothing but this argument reads."""
        at = self.maker.get(arg.name) if isinstance(arg, Ref) else None
        wanted = at is not None and self.calls[at].op in ops and self.uses[arg.name] == 1
        return at if wanted else None

    def two_bytes(self, name: str) -> bool:
        """Whether a value's type is what the tensor cores multiply without loss."""
        return self.function.types[name].dtype in ("bfloat16", "float16")

    def types_of(self, name: str) -> TensorType:
        """A value's type, new and changed ones too."""
        return self.types.get(name) or self.function.types[name]

    def finish(self) -> Function:
        """The function with every replacement in place; ``types`` are those of new and changed values."""
        calls = tuple(call for place in self.places for call in place)
        return replace(self.function, calls=calls, types={**self.function.types, **self.types})
