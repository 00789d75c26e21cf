"""Which blocks of the state each sequence uses: counted references a group, block tables as arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from llmopt.program import StateGroup, StatePlan
from llmopt.runtime.protocol import IntArray

Tables = npt.NDArray[np.int32]


class BlockPool:
    """Blocks 0 … total-1 of one group; a block is free, or has one reference for every holder."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._references = [0] * total

    @property
    def free(self) -> int:
        """Blocks nobody holds."""
        return len(self._free)

    def free_blocks(self) -> tuple[int, ...]:
        """Blocks nobody holds, the next one to be taken first."""
        return tuple(reversed(self._free))

    def exchange(self, held: int, free: int) -> None:
        """The holder of a block that nobody shares takes a free one in its place."""
        self._free.remove(free)
        self._references[free] = 1
        self.give([held])

    def references(self, block: int) -> int:
        """How many hold a block."""
        return self._references[block]

    def take(self, count: int) -> list[int]:
        """``count`` free blocks with one reference each; the caller has checked ``free``."""
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._references[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for each block. Raises ValueError for a block that nobody holds."""
        for block in blocks:
            if not self._references[block]:
                raise ValueError(f"block {block} is shared, but nobody holds it")
            self._references[block] += 1

    def give(self, blocks: Iterable[int]) -> None:
        """A holder lets go of blocks. Raises ValueError for a block that nobody holds (a double free)."""
        references = self._references
        for block in blocks:
            if not references[block]:
                raise ValueError(f"block {block} is freed twice")
            references[block] -= 1
            if not references[block]:
                self._free.append(block)


class StateAllocator:
    """Block tables of every sequence over every group; a request is met in all groups or in none.

    ``blocks``: blocks by group name, as the executor's limits give them. A sequence with blocks has a *place*, its
    row in the groups' table arrays. ``reclaim``: called with the blocks wanted by group when too few are free; it
    may free some.
    """

    def __init__(self, plan: StatePlan, blocks: Mapping[str, int]) -> None:
        self.groups: tuple[StateGroup, ...] = plan.groups
        self.pools = {group.name: BlockPool(blocks[group.name]) for group in plan.groups}
        self.reclaim: Callable[[Mapping[str, int]], None] | None = None
        self._tables: dict[str, Tables] = {g.name: np.zeros((8, 4), np.int32) for g in plan.groups}
        self._counts: dict[str, IntArray] = {g.name: np.zeros(8, np.int64) for g in plan.groups}
        self._places: dict[int, int] = {}
        self._spare = list(range(7, -1, -1))
        self.releases = 0
        """How often a sequence has let go of blocks: what did not fit cannot fit before that."""

    def capacity(self) -> int | None:
        """Most tokens one sequence can hold with every block to itself (None: no limit but the context)."""
        limits = [0 for g in self.groups if self.pools[g.name].total == 0]
        limits += [self.pools[g.name].total * g.block_size for g in self.groups if g.kind == "paged"]
        limits += [g.block_size for g in self.groups if g.kind == "slots"]
        return min(limits, default=None)

    def place(self, seq_id: int) -> int:
        """The row of a sequence in the tables; it has one from its first block to its release."""
        return self._places[seq_id]

    def adopt(self, seq_id: int, blocks: Mapping[str, Sequence[int]]) -> None:
        """Append blocks by group to a sequence's tables; the caller's reference to each becomes the sequence's."""
        place = self._place(seq_id)
        for name, some in blocks.items():
            self._append(name, place, some)

    def put(self, seq_id: int, name: str, block: int) -> None:
        """Another block as the first one of a sequence in a group; the references are the caller's to exchange."""
        self._tables[name][self._places[seq_id], 0] = block

    def missing(self, seq_id: int, tokens: int) -> dict[str, int]:
        """Blocks by group that a sequence lacks for its first ``tokens`` tokens."""
        known = self._places.get(seq_id)
        missing = {}
        for group in self.groups:
            held = 0 if known is None else int(self._counts[group.name][known])
            if (count := group.blocks_for(tokens) - held) > 0:
                missing[group.name] = count
        return missing

    def extend(self, seq_id: int, tokens: int) -> bool:
        """Give a sequence blocks for its first ``tokens`` tokens; False, and nothing taken, when too few are free."""
        missing = self.missing(seq_id, tokens)
        if self._short(missing):
            if self.reclaim is not None:
                self.reclaim(missing)
            if self.reclaim is None or self._short(missing):
                return False
        place = self._place(seq_id)
        for name, count in missing.items():
            self._append(name, place, self.pools[name].take(count))
        return True

    def table(self, seq_id: int, tokens: int) -> dict[str, IntArray]:
        """Block ids by group, in position order, that cover the first ``tokens`` tokens of a sequence."""
        place = self._places[seq_id]
        return {g.name: self._tables[g.name][place, : g.blocks_for(tokens)].astype(np.int64) for g in self.groups}

    def held(self, seq_id: int) -> dict[str, list[int]]:
        """Every block of a sequence by group, in position order."""
        place = self._places[seq_id]
        return {g.name: self._tables[g.name][place, : self._counts[g.name][place]].tolist() for g in self.groups}

    def gather(self, places: IntArray, longest: int) -> dict[str, Tables]:
        """Tables (n, W) by group of the sequences at ``places``, wide enough for ``longest`` tokens."""
        return {g.name: self._tables[g.name][places, : g.blocks_for(longest)] for g in self.groups}

    def lacking(self, places: IntArray, tokens: IntArray) -> IntArray:
        """Indices of those ``places`` whose blocks do not cover as many ``tokens`` (n,)."""
        lacks = np.zeros(len(places), bool)
        for group in self.groups:
            if group.kind == "paged":
                lacks |= self._counts[group.name][places] * group.block_size < tokens
        return np.flatnonzero(lacks)

    def release(self, seq_id: int) -> None:
        """A sequence lets go of all its blocks; one that has none is fine."""
        place = self._places.pop(seq_id, None)
        if place is None:
            return
        self.releases += 1
        for name, pool in self.pools.items():
            count = int(self._counts[name][place])
            pool.give(self._tables[name][place, :count][::-1].tolist())
            self._counts[name][place] = 0
        self._spare.append(place)

    def owners(self) -> frozenset[int]:
        """Sequences that hold blocks."""
        return frozenset(self._places)

    def _short(self, missing: Mapping[str, int]) -> bool:
        return any(self.pools[name].free < count for name, count in missing.items())

    def _place(self, seq_id: int) -> int:
        if seq_id not in self._places:
            if not self._spare:
                self._add_places()
            self._places[seq_id] = self._spare.pop()
        return self._places[seq_id]

    def _add_places(self) -> None:
        """Twice as many rows."""
        count = len(self._places)
        for name, table in self._tables.items():
            self._tables[name] = np.concatenate((table, np.zeros_like(table)))
            self._counts[name] = np.concatenate((self._counts[name], np.zeros_like(self._counts[name])))
        self._spare = list(range(2 * count - 1, count - 1, -1))

    def _append(self, name: str, place: int, blocks: Sequence[int]) -> None:
        table, counts = self._tables[name], self._counts[name]
        start = int(counts[place])
        stop = start + len(blocks)
        if stop > table.shape[1]:
            grown = np.zeros((len(table), max(stop, 2 * table.shape[1])), np.int32)
            grown[:, : table.shape[1]] = table
            self._tables[name] = table = grown
        table[place, start:stop] = blocks
        counts[place] = stop
