"""Where a sequence's state lives: blocks, shared or its own, the prefix cache, host memory."""

from __future__ import annotations

from collections.abc import Collection, Hashable

import numpy as np

from llmopt.program import StatePlan
from llmopt.runtime.options import SchedulerOptions
from llmopt.runtime.placement import bring_closer
from llmopt.runtime.prefix import Match, PrefixCache
from llmopt.runtime.protocol import ExecutorLimits, StateOp
from llmopt.runtime.sequence import Sequence
from llmopt.runtime.state import StateAllocator
from llmopt.runtime.swap import SwapSpace

NONE = np.zeros(0, np.int64)


class Residence:
    """Brings states in and takes them out. ``ops``: the state operations of the next step, in order."""

    def __init__(self, plan: StatePlan, limits: ExecutorLimits, options: SchedulerOptions) -> None:
        self.limits = limits
        self.allocator = StateAllocator(plan, limits.blocks)
        self.cache = PrefixCache(plan, self.allocator, enabled=options.prefix_cache)
        self.swap = SwapSpace(options.swap, plan.groups)
        self.ops: list[StateOp] = []
        self.prompt_tokens = self.cached_tokens = 0

    def bring_in(self, sequence: Sequence, running: Collection[int]) -> bool:
        """Blocks for all known tokens of a sequence, filled from host memory or a cached prefix.

        False when too few are free, or (``sequence.awaits``) when it is better to wait for a prefix that is being
        computed. A block is left for each ``running`` sequence: else one of them would soon be preempted.
        """
        return self._swap_in(sequence, running) if sequence.swapped else self._start(sequence, running)

    def fits(self, sequence: Sequence, running: Collection[int]) -> bool:
        """Whether a waiting sequence could be brought in now, shared blocks apart."""
        return self._has({g.name: g.blocks_for(sequence.known) for g in self.allocator.groups}, running)

    def move_out(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks, all its tokens being known: to host memory, if that pays.

        A state whose last token is one too many for its rotary table is of no use to anybody who comes back.
        """
        outgrown = self._long(sequence.rope_len) != self._long(sequence.known)
        if not outgrown and self.swap.pays(sequence.computed):
            sequence.swapped = self.swap.size(sequence.computed)
            self.swap.hold(sequence.swapped)
            for name, blocks in self.allocator.table(sequence.seq_id, sequence.computed).items():
                self.ops.append(StateOp("swap_out", name, blocks, NONE, key=sequence.seq_id))
        self.let_go(sequence)

    def let_go(self, sequence: Sequence) -> None:
        """Give up a sequence's blocks; the cache keeps what it can of them."""
        states = min(sequence.computed, sequence.known)
        self.cache.leave(sequence.seq_id, sequence.tokens(0, states), exact=states == sequence.computed)
        self.allocator.release(sequence.seq_id)

    def drop(self, sequence: Sequence) -> None:
        """A waiting sequence has ended: nothing of it stays in host memory."""
        if sequence.swapped:
            key = sequence.seq_id
            self.ops += [StateOp("swap_drop", g.name, NONE, NONE, key=key) for g in self.allocator.groups]
            self.swap.free(sequence.swapped)

    def _start(self, sequence: Sequence, running: Collection[int]) -> bool:
        tokens = sequence.tokens(0, sequence.known)
        base = Match(self._salt(sequence))
        match = base if sequence.scored else self.cache.match(base.salt, tokens)
        if match.pending is not None:
            sequence.awaits = match.pending
            return False
        if not self._claim(sequence, match, running):
            # With nobody else there, what the match keeps from being freed may be just what is missing.
            if running or not match.tokens or not self._claim(sequence, base, running):
                return False
            match = base
        self.ops += self.cache.enter(sequence.seq_id, match, tokens)
        if not sequence.rope_len:  # preempted, it would find what it left itself
            sequence.cached = match.tokens
        sequence.computed, sequence.rope_len = match.tokens, sequence.known
        self.prompt_tokens += sequence.known
        self.cached_tokens += match.tokens
        return True

    def _swap_in(self, sequence: Sequence, running: Collection[int]) -> bool:
        base = Match(self._salt(sequence))
        if not self._claim(sequence, base, running):
            return False
        seq_id = sequence.seq_id
        for name, blocks in self.allocator.table(seq_id, sequence.computed).items():
            self.ops.append(StateOp("swap_in", name, NONE, blocks, key=seq_id))
        self.ops += self.cache.enter(seq_id, base, sequence.tokens(0, sequence.known))
        self.cache.progress(seq_id, sequence.computed)
        self.swap.free(sequence.swapped)
        sequence.swapped = 0
        return True

    def _claim(self, sequence: Sequence, match: Match, running: Collection[int]) -> bool:
        """Blocks for all known tokens, those of the match first; nothing is taken, or evicted, when they do not fit."""
        seq_id = sequence.seq_id
        self.cache.claim(seq_id, match)
        fits = self._has(self.allocator.missing(seq_id, sequence.known), running)
        if not (fits and self.allocator.extend(seq_id, sequence.known)):
            self.cache.abandon(seq_id, match)
            return False
        if self.limits.ranged:
            self.ops += bring_closer(self.cache, seq_id, running)
        return True

    def _has(self, missing: dict[str, int], running: Collection[int]) -> bool:
        """Whether that many blocks can be had by group, and another one for each running sequence."""
        cached, pools = self.cache.cached(), self.allocator.pools
        paged = {g.name for g in self.cache.paged}
        return all(
            pools[g.name].free + cached[g.name] >= missing.get(g.name, 0) + (len(running) if g.name in paged else 0)
            for g in self.allocator.groups
        )

    def _salt(self, sequence: Sequence) -> Hashable:
        """What equal tokens must have in common for equal states: the caller's salt and the rotary table."""
        return sequence.salt, self._long(sequence.known)

    def _long(self, tokens: int) -> bool:
        """Whether so many tokens ask for the rotary table of long sequences."""
        return self.limits.rope_switch is not None and tokens > self.limits.rope_switch
