"""Block accounting under random use: no leak, no double free, less than a block wasted a sequence."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmopt.runtime.state import BlockPool, StateAllocator
from tests.runtime.fake import plan_of

PLAN = plan_of("paged", "slots", "ring")
BLOCKS = {"paged0": 12, "slots1": 4, "ring2": 5}


class Allocation(RuleBasedStateMachine):
    """Extends and releases sequences; keeps a model of who should hold what."""

    def __init__(self):
        super().__init__()
        self.allocator = StateAllocator(PLAN, BLOCKS)
        self.tokens = {}
        self.tables = {}

    @rule(seq=st.integers(0, 6), more=st.integers(1, 9))
    def extend(self, seq, more):
        wanted = self.tokens.get(seq, 0) + more
        need = {g.name: g.blocks_for(wanted) - self.held(seq, g) for g in PLAN.groups}
        fits = all(need[g.name] <= BLOCKS[g.name] - self.used(g) for g in PLAN.groups)
        assert self.allocator.extend(seq, wanted) == fits
        if fits:
            self.tokens[seq] = wanted

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def release(self, data):
        seq = data.draw(st.sampled_from(sorted(self.tokens)))
        self.allocator.release(seq)
        del self.tokens[seq]
        self.tables.pop(seq, None)

    def held(self, seq, group):
        return group.blocks_for(self.tokens[seq]) if seq in self.tokens else 0

    def used(self, group):
        return sum(group.blocks_for(n) for n in self.tokens.values())

    @invariant()
    def pools_add_up_and_no_block_has_two_owners(self):
        assert self.allocator.owners() == set(self.tokens)
        for group in PLAN.groups:
            tables = [self.allocator.table(s, n)[group.name] for s, n in self.tokens.items()]
            owned = [b for t in tables for b in t.tolist()]
            assert len(set(owned)) == len(owned) == self.used(group)
            assert all(0 <= b < BLOCKS[group.name] for b in owned)
            assert self.allocator.pools[group.name].free == BLOCKS[group.name] - len(owned)
            if group.kind == "paged":
                for table, n in zip(tables, self.tokens.values()):
                    assert 0 <= len(table) * group.block_size - n < group.block_size

    @invariant()
    def tables_only_grow(self):
        """A step in flight keeps tables: what they say may not change, whoever gets their rows next."""
        for seq, n in self.tokens.items():
            table = self.allocator.table(seq, n)
            for name, (given, copy) in self.tables.get(seq, {}).items():
                assert np.array_equal(given, copy)
                assert np.array_equal(table[name][: len(copy)], copy)
            self.tables[seq] = {name: (blocks, blocks.copy()) for name, blocks in table.items()}

    @invariant()
    def gathered_rows_are_the_tables(self):
        seqs = sorted(self.tokens)
        if not seqs:
            return
        places = np.array([self.allocator.place(seq) for seq in seqs])
        lengths = np.array([self.tokens[seq] for seq in seqs])
        gathered = self.allocator.gather(places, int(lengths.max()))
        for i, seq in enumerate(seqs):
            for name, blocks in self.allocator.table(seq, self.tokens[seq]).items():
                assert gathered[name][i, : len(blocks)].tolist() == blocks.tolist()
        full = [n % 4 == 0 for n in lengths]  # blocks of 4 tokens: the next token needs another one
        assert self.allocator.lacking(places, lengths).tolist() == []
        assert self.allocator.lacking(places, lengths + 1).tolist() == np.flatnonzero(full).tolist()


TestAllocation = Allocation.TestCase
TestAllocation.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)


def test_a_failed_extension_takes_nothing():
    allocator = StateAllocator(PLAN, {"paged0": 12, "slots1": 0, "ring2": 5})
    assert not allocator.extend(1, 5)
    assert [p.free for p in allocator.pools.values()] == [12, 0, 5]
    assert not allocator.owners()


def test_a_double_free_is_noticed():
    pool = BlockPool(3)
    [block] = pool.take(1)
    pool.give([block])
    with pytest.raises(ValueError, match=f"block {block} is freed twice"):
        pool.give([block])


def test_a_shared_block_is_free_when_the_last_holder_lets_go():
    pool = BlockPool(3)
    [block] = pool.take(1)
    pool.share([block])
    pool.give([block])
    assert (pool.free, pool.references(block)) == (2, 1)
    pool.give([block])
    assert pool.free == 3
    with pytest.raises(ValueError, match=f"block {block} is shared, but nobody holds it"):
        pool.share([block])


def test_adopted_blocks_come_first():
    allocator = StateAllocator(plan_of("paged"), {"paged0": 8})
    assert allocator.extend(1, 9)
    shared = allocator.held(1)["paged0"][:2]
    allocator.pools["paged0"].share(shared)
    allocator.adopt(2, {"paged0": shared})
    assert allocator.extend(2, 12)
    assert allocator.held(2)["paged0"][:2] == shared
    assert allocator.pools["paged0"].free == 8 - 4
    allocator.release(1)
    allocator.release(2)
    assert allocator.pools["paged0"].free == 8


def test_what_can_be_reclaimed_is_asked_for_before_giving_up():
    allocator = StateAllocator(plan_of("paged"), {"paged0": 4})
    assert allocator.extend(1, 12)
    asked = []

    def reclaim(missing):
        asked.append(dict(missing))
        allocator.release(1)

    allocator.reclaim = reclaim
    assert allocator.extend(2, 8)
    assert asked == [{"paged0": 2}]
    assert allocator.owners() == {2}


@pytest.mark.parametrize(
    ("kinds", "blocks", "capacity"),
    [(("paged",), [5], 20), (("slots",), [3], 64), (("ring",), [1], None), (("ring",), [0], 0), ((), [], None)],
)
def test_capacity_of_one_sequence(kinds, blocks, capacity):
    plan = plan_of(*kinds)
    allocator = StateAllocator(plan, {g.name: n for g, n in zip(plan.groups, blocks)})
    assert allocator.capacity() == capacity
