"""Which blocks of the state each sequence owns: one free list a state group, one block table a sequence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from llmopt.program import StateGroup, StatePlan
from llmopt.runtime.protocol import IntArray


class BlockPool:
    """Blocks 0 … total-1 of one group, each free or owned once."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._owned = bytearray(total)

    @property
    def free(self) -> int:
        """Blocks nobody owns."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """``count`` free blocks; the caller has checked ``free``."""
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._owned[block] = 1
        return taken

    def give(self, blocks: Iterable[int]) -> None:
        """Blocks come back. Raises ValueError for a block that is not owned (a double free)."""
        for block in blocks:
            if not self._owned[block]:
                raise ValueError(f"block {block} is freed twice")
            self._owned[block] = 0
            self._free.append(block)


class _Table:
    """Block ids of one sequence in one group. Entries never change once written, so slices stay valid in flight."""

    __slots__ = ("blocks", "count")

    def __init__(self) -> None:
        self.blocks = np.zeros(4, np.int64)
        self.count = 0

    def append(self, blocks: list[int]) -> None:
        count = self.count + len(blocks)
        if count > len(self.blocks):
            grown = np.zeros(max(count, 2 * len(self.blocks)), np.int64)
            grown[: self.count] = self.blocks[: self.count]
            self.blocks = grown
        self.blocks[self.count : count] = blocks
        self.count = count


class StateAllocator:
    """Block tables of every sequence over every group; a request is met in all groups or in none.

    ``blocks``: blocks by group name, as the executor's limits give them.
    """

    def __init__(self, plan: StatePlan, blocks: Mapping[str, int]) -> None:
        self.groups: tuple[StateGroup, ...] = plan.groups
        self.pools = {group.name: BlockPool(blocks[group.name]) for group in plan.groups}
        self._tables: dict[int, dict[str, _Table]] = {}

    def capacity(self) -> int | None:
        """Most tokens one sequence can hold with every block to itself (None: no limit but the context)."""
        limits = [0 for g in self.groups if self.pools[g.name].total == 0]
        limits += [self.pools[g.name].total * g.block_size for g in self.groups if g.kind == "paged"]
        limits += [g.block_size for g in self.groups if g.kind == "slots"]
        return min(limits, default=None)

    def extend(self, seq_id: int, tokens: int) -> bool:
        """Give a sequence blocks for its first ``tokens`` tokens; False, and nothing taken, when too few are free."""
        table = self._tables.get(seq_id) or {g.name: _Table() for g in self.groups}
        missing = {g.name: max(0, g.blocks_for(tokens) - table[g.name].count) for g in self.groups}
        if any(self.pools[name].free < count for name, count in missing.items()):
            return False
        for name, count in missing.items():
            if count:
                table[name].append(self.pools[name].take(count))
        self._tables[seq_id] = table
        return True

    def table(self, seq_id: int, tokens: int) -> dict[str, IntArray]:
        """Block ids by group, in position order, that cover the first ``tokens`` tokens of a sequence."""
        table = self._tables[seq_id]
        return {g.name: table[g.name].blocks[: g.blocks_for(tokens)] for g in self.groups}

    def release(self, seq_id: int) -> None:
        """All blocks of a sequence come back; a sequence that owns none is fine."""
        for name, table in self._tables.pop(seq_id, {}).items():
            self.pools[name].give(table.blocks[: table.count][::-1].tolist())

    def owners(self) -> frozenset[int]:
        """Sequences that own blocks."""
        return frozenset(self._tables)
