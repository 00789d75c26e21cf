"""A request as the scheduler sees it, from the queue to its end."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from llmopt.runtime.protocol import IntArray, SamplingParams
from llmopt.runtime.radix import Node


@dataclass(slots=True, eq=False)
class Sequence:
    """One sequence.

    ``budget``: tokens it may draw. ``computed``: tokens in the state once every planned step has run. ``pending``:
    tokens drawn by steps in flight, unknown to the host. ``rope_len``: the length its rotary table was chosen for
    (two-table models). ``constrained``: its tokens are drawn under a mask.
    ``scored``: the logits of every prompt row are wanted. ``priority``: lower goes first. ``tenant``: whose share it
    uses. ``salt``: of its cached prefixes. ``order`` and ``arrival`` (seconds): when it came. ``deadline``: the time
    by which it must have ended. ``awaits``: a chunk of its prompt that another sequence is computing. ``swapped``:
    bytes of its state in host memory. ``cached``: prompt tokens that were in the prefix cache when it first started,
    ``waited`` seconds after it came.
    """

    seq_id: int
    prompt: IntArray
    sampling: SamplingParams
    budget: int
    constrained: bool = False
    scored: bool = False
    priority: int = 0
    tenant: str = ""
    salt: str = ""
    deadline: float | None = None
    order: int = 0
    arrival: float = 0.0
    output: list[int] = field(default_factory=list)
    computed: int = 0
    pending: int = 0
    rope_len: int = 0
    awaits: Node | None = None
    swapped: int = 0
    cached: int = 0
    waited: float = 0.0

    @property
    def known(self) -> int:
        """Tokens the host knows."""
        return len(self.prompt) + len(self.output)

    @property
    def length(self) -> int:
        """Tokens that exist, pending ones included."""
        return self.known + self.pending

    def tokens(self, start: int, stop: int) -> IntArray:
        """Ids at positions ``start … stop-1``; none of them may be pending."""
        if stop <= len(self.prompt):
            return self.prompt[start:stop]
        if start >= len(self.prompt):
            return np.array(self.output[start - len(self.prompt) : stop - len(self.prompt)], np.int64)
        return np.concatenate((self.prompt[start:], np.array(self.output[: stop - len(self.prompt)], np.int64)))
