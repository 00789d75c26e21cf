"""Keeps the blocks of those who run close together, for executors whose calls cover a range of blocks."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from llmopt.runtime.prefix import PrefixCache
from llmopt.runtime.protocol import StateOp


def bring_closer(cache: PrefixCache, seq_id: int, running: Iterable[int]) -> list[StateOp]:
    """Exchange a new sequence's blocks, in groups with one block a sequence, for ones nearer to those ``running``.

    Where the nearer block holds a snapshot, that is copied to the block given up: once, where a gap costs a row or a
    call in every step. Nothing may have been written to the sequence's blocks yet; one taken over stays.
    """
    allocator, ops = cache.allocator, []
    others = [seq for seq in running if seq != seq_id]
    for group in cache.single if others else ():
        name, pool = group.name, allocator.pools[group.name]
        taken = sorted(allocator.held(seq)[name][0] for seq in others)
        own = allocator.held(seq_id)[name][0]
        if pool.references(own) > 1:
            continue
        kept = {s.blocks[name]: s for s in cache.idle_snapshots()}
        choices = [own, *pool.free_blocks(), *(kept if group.copyable else ())]
        spans = [max(taken[-1], block) - min(taken[0], block) for block in choices]
        best = choices[spans.index(min(spans))]  # the first of equals: rather none moves, rather no copy
        if best == own:
            continue
        if best in kept:
            snapshot = kept[best]
            ops.append(StateOp("copy", name, np.array([best]), np.array([own]), length=snapshot.length))
            snapshot.blocks[name] = own
        else:
            pool.exchange(own, best)
        allocator.put(seq_id, name, best)
    return ops
