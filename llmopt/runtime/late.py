"""Masks of tokens that follow a token still being drawn: known once the steps before are, not earlier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from llmopt.runtime.allowed import Bitmask


class LateMasks(Mapping[int, Bitmask]):
    """Masks of ``seq_ids``; the first one read settles all of them.

    ``settle`` collects the steps in flight before this one and returns the masks that follow. A sequence that turns
    out to have ended needs none: its row is an overrun, and anything may be drawn (``words``: of a mask).
    """

    def __init__(self, seq_ids: Sequence[int], words: int, settle: Callable[[], Mapping[int, Bitmask]]) -> None:
        self._seq_ids, self._words, self._settle = dict.fromkeys(seq_ids), words, settle
        self._found: Mapping[int, Bitmask] | None = None

    def __getitem__(self, seq_id: int) -> Bitmask:
        if seq_id not in self._seq_ids:
            raise KeyError(seq_id)
        if self._found is None:
            self._found = self._settle()
        return self._found[seq_id] if seq_id in self._found else np.full(self._words, 2**32 - 1, np.uint32)

    def __contains__(self, seq_id: object) -> bool:
        return seq_id in self._seq_ids

    def __iter__(self) -> Iterator[int]:
        return iter(self._seq_ids)

    def __len__(self) -> int:
        return len(self._seq_ids)
