"""The sequences that decode, as arrays: a step's work on them does not grow with Python's cost of a sequence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmopt.runtime.protocol import IntArray
from llmopt.runtime.sequence import Sequence


@dataclass(frozen=True)
class Drawn:
    """The sequences a planned step draws a token for: their ids (n,) and places (n,), decode rows first."""

    seq_ids: IntArray
    places: IntArray


class Decoding:
    """Sequences whose next row is their last drawn token, by their place in the block tables.

    Such a sequence has all its tokens in the state but the last one, which may still be pending. Here ``starts`` says
    how many that are; ``Sequence.computed`` and ``pending`` say it again when the sequence leaves.
    """

    def __init__(self, places: int) -> None:
        self.ids = np.full(places, -1, np.int64)
        self.starts, self.known, self.stops, self.rope_lens, self.tenants = np.zeros((5, places), np.int64)
        self.constrained = np.zeros(places, bool)
        self._members: dict[int, int] = {}
        self._sequences: dict[int, Sequence] = {}
        self._order: IntArray | None = None
        self._names: dict[str, int] = {}
        self._turn = 0

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, seq_id: int) -> bool:
        return seq_id in self._members

    def join(self, sequence: Sequence, place: int) -> None:
        """The step that draws the sequence's token has been planned."""
        if place >= len(self.ids):
            self._add_places(place)
        self.ids[place] = sequence.seq_id
        self.starts[place], self.known[place] = sequence.computed, sequence.known
        self.stops[place] = len(sequence.prompt) + sequence.budget
        self.rope_lens[place], self.constrained[place] = sequence.rope_len, sequence.constrained
        self.tenants[place] = self._names.setdefault(sequence.tenant, len(self._names))
        self._members[sequence.seq_id], self._sequences[place] = place, sequence
        self._order = None

    def leave(self, sequence: Sequence) -> None:
        """The sequence ends, or gives up its place; it learns what its state holds."""
        place = self._members.pop(sequence.seq_id)
        del self._sequences[place]
        sequence.computed = int(self.starts[place])
        sequence.pending = int(self.starts[place] + 1 - self.known[place])
        self.ids[place] = -1
        self._order = None
        if len(self._names) > 64 + 2 * len(self._members):
            self._names.clear()
            for place, member in self._sequences.items():
                self.tenants[place] = self._names.setdefault(member.tenant, len(self._names))

    def pending(self) -> bool:
        """Whether a drawn token of any of them is unknown."""
        order = self._places()
        return bool((self.starts[order] >= self.known[order]).any())

    def going(self) -> bool:
        """Whether any of them has tokens left to draw."""
        order = self._places()
        return bool((self.starts[order] + 1 < self.stops[order]).any())

    def ready(self, room: int) -> IntArray:
        """Places (n,) of those that may take a row now, at most ``room``: in turn, when there are more."""
        order = self._places()
        starts = self.starts[order]
        may = starts + 1 < self.stops[order]
        chosen = order[may]
        if len(chosen) <= room:
            return chosen
        self._turn = (self._turn + room) % len(chosen)
        return np.roll(chosen, -self._turn)[:room]

    def learn(self, drawn: Drawn) -> npt.NDArray[np.bool_]:
        """The tokens of a step are known; False (n,) where the sequence is no longer here."""
        here: npt.NDArray[np.bool_] = self.ids[drawn.places] == drawn.seq_ids
        self.known[drawn.places[here]] += 1
        return here

    def shares(self, places: IntArray) -> dict[str, int]:
        """Sequences by tenant."""
        counts = np.bincount(self.tenants[places], minlength=len(self._names))
        return dict(zip(self._names, counts.tolist()))

    def _places(self) -> IntArray:
        """Places of all of them, in order of joining."""
        if self._order is None:
            self._order = np.fromiter(self._members.values(), np.int64, len(self._members))
        return self._order

    def _add_places(self, place: int) -> None:
        more = place + 1 + len(self.ids)
        for name in ("ids", "starts", "known", "stops", "rope_lens", "tenants", "constrained"):
            old = getattr(self, name)
            setattr(self, name, np.concatenate((old, np.full(more - len(old), -1, old.dtype))))
