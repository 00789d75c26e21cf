"""The prefix cache: states of earlier prompts and answers, found by their tokens and shared or copied."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmopt.program import StatePlan
from llmopt.runtime.protocol import IntArray, StateOp
from llmopt.runtime.radix import TOKEN_BYTES, Node, Radix, Snapshot, common
from llmopt.runtime.state import StateAllocator

GRANULE = 16
"""Tokens of a chunk where no group is paged."""


@dataclass(frozen=True)
class Match:
    """What the cache has of a prompt: ``tokens`` of them in whole chunks (``nodes``), a part of one (``tail``), and,
    for the groups that keep one block a sequence, a ``snapshot``. ``pending``: a chunk that would match further and
    that a running sequence is computing."""

    salt: Hashable
    nodes: tuple[Node, ...] = ()
    tail: Node | None = None
    snapshot: Snapshot | None = None
    tokens: int = 0
    pending: Node | None = None


@dataclass(slots=True)
class _Chain:
    """A running sequence's path. ``open``: it covers all chunks so far, so that more may follow. ``fresh``: index of
    the first node it has not passed yet."""

    root: Node
    nodes: list[Node]
    open: bool = True
    snapshot: Snapshot | None = None
    fresh: int = 0


class PrefixCache:
    """Keeps states for as long as nobody needs their blocks. Which layouts allow that, the plan's bits say:

    blocks of paged groups are shared when every such group is ``shareable``, the last, partly matching one is copied
    before it is written (``copyable`` and ``truncatable``); a group with one block a sequence is copied whole, or
    taken over, from a sequence that shares the prefix: at exactly its length, or at a shorter one when
    ``truncatable``. Nothing is kept of a plan whose bits forbid this.
    """

    def __init__(self, plan: StatePlan, allocator: StateAllocator, *, enabled: bool = True) -> None:
        self.allocator = allocator
        self.paged = [g for g in plan.groups if g.kind == "paged"]
        self.single = [g for g in plan.groups if g.kind != "paged"]
        allowed = all(g.shareable for g in self.paged) and all(g.copyable for g in self.single)
        self.enabled = enabled and allowed and bool(plan.groups)
        self.partial = all(g.copyable and g.truncatable for g in self.paged)
        self.shortens = all(g.truncatable for g in self.single)
        self.granule = math.lcm(*(g.block_size for g in self.paged)) if self.paged else GRANULE
        self.tree = Radix(self.granule, len(self.paged))
        self._chains: dict[int, _Chain] = {}
        self._snapshots: dict[Snapshot, None] = {}
        """Those that own their blocks, oldest first."""
        if self.enabled:
            allocator.reclaim = self.reclaim

    # --- finding -----------------------------------------------------------------------------------------------

    def match(self, salt: Hashable, tokens: IntArray) -> Match:
        """The longest usable prefix of ``tokens`` (T,), at most T - 1 of them: the last row must be computed."""
        root = self.tree.find(salt) if self.enabled else None
        if root is None:
            return Match(salt)
        limit, pending = len(tokens) - 1, None
        nodes: list[Node] = []
        for node in self.tree.descend(root, tokens, limit):
            if node.owner is not None:
                pending = node
                break
            nodes.append(node)
        if self.single:
            found = self._snapshot(Match(salt), nodes, tokens[:limit])
        else:
            found = self._partial(Match(salt), nodes[-1] if nodes else root, nodes, tokens[:limit])
        return replace(found, pending=(pending or found.pending) if self.shortens else None)

    def _partial(self, base: Match, node: Node, nodes: list[Node], tokens: IntArray) -> Match:
        """With a part of one more chunk, where blocks may be copied."""
        depth = len(nodes) * self.granule
        tail, count = self.tree.nearest(node, tokens[depth:]) if self.partial else (None, 0)
        if tail is not None and tail.owner is not None:
            pending = tail if depth + count == len(tokens) else None
            return replace(base, nodes=tuple(nodes), tokens=depth, pending=pending)
        return replace(base, nodes=tuple(nodes), tail=tail, tokens=depth + count)

    def _snapshot(self, best: Match, nodes: list[Node], tokens: IntArray) -> Match:
        """The snapshot of a sequence that shares the longest prefix it can still serve."""
        for depth in range(len(nodes), 0, -1):
            start = depth * self.granule
            for snapshot in nodes[depth - 1].snapshots:
                tail = snapshot.path[depth] if len(snapshot.path) > depth else None
                length = min(start + common(snapshot.tokens[start:], tokens[start:]), snapshot.length)
                if self.paged and (tail is None or not self.partial or not tail.usable):
                    length = min(length, start)
                if length > best.tokens and (length == snapshot.length or self.shortens) and length >= start:
                    used = tail if self.paged and length > start else None
                    best = Match(best.salt, tuple(nodes[:depth]), used, snapshot, length)
            if best.snapshot is not None:
                break
        return best

    # --- using -------------------------------------------------------------------------------------------------

    def claim(self, seq_id: int, match: Match) -> None:
        """Put the shared blocks at the front of a new sequence's tables; end with ``enter`` or ``abandon``."""
        if self.enabled:
            self.tree.pin(self.tree.root(match.salt))
        for node in (*match.nodes, *((match.tail,) if match.tail else ())):
            self.tree.pin(node)
        blocks: dict[str, list[int]] = {}
        for i, group in enumerate(self.paged):
            whole = match.tokens // group.block_size
            last = match.tail.blocks[i] if match.tail else ()
            blocks[group.name] = [b for node in match.nodes for b in node.blocks[i]] + list(last)
            del blocks[group.name][whole:]
            self.allocator.pools[group.name].share(blocks[group.name])
        if match.snapshot is not None:
            match.snapshot.pins += 1
            for node in match.snapshot.path:
                self.tree.pin(node)
            for group in self.single:
                if self._takes_over(match.snapshot, group.name, match.tokens):
                    blocks[group.name] = [match.snapshot.blocks[group.name]]
                    self.allocator.pools[group.name].share(blocks[group.name])
        self.allocator.adopt(seq_id, blocks)

    def _takes_over(self, snapshot: Snapshot, name: str, tokens: int) -> bool:
        """Instead of copying: when nothing is lost by it, or there is no block to copy to."""
        return not snapshot.live and (tokens >= snapshot.length - 1 or not self.allocator.pools[name].free)

    def _taken_over(self, seq_id: int, snapshot: Snapshot) -> bool:
        held = self.allocator.held(seq_id)
        return not snapshot.live and any(held[g.name][0] == snapshot.blocks[g.name] for g in self.single)

    def abandon(self, seq_id: int, match: Match) -> None:
        """Undo ``claim``."""
        self.allocator.release(seq_id)
        self._unpin(match)
        for node in match.nodes:
            self.tree.unpin(node)
        if self.enabled:
            self.tree.unpin(self.tree.root(match.salt))

    def enter(self, seq_id: int, match: Match, tokens: IntArray) -> list[StateOp]:
        """A claimed sequence has blocks for all ``tokens``: the copies its prefix needs, in order, before its rows.

        Its other chunks are announced: they match once ``progress`` has passed them.
        """
        ops = self._copies(seq_id, match)
        self._unpin(match)
        if match.snapshot is not None and self._taken_over(seq_id, match.snapshot):
            self._drop(match.snapshot)
        if not self.enabled:
            return ops
        chain = self._chains[seq_id] = _Chain(self.tree.root(match.salt), list(match.nodes), fresh=len(match.nodes))
        self._grow(seq_id, chain, tokens, seq_id)
        if self.single and self.shortens:
            held = self.allocator.held(seq_id)
            blocks = {g.name: held[g.name][0] for g in self.single}
            chain.snapshot = self._register(Snapshot(tokens, match.tokens, blocks, chain.nodes, True))
        return ops

    def _copies(self, seq_id: int, match: Match) -> list[StateOp]:
        ops, held, none = [], self.allocator.held(seq_id), np.zeros(0, np.int64)
        for i, group in enumerate(self.paged):
            whole, part = divmod(match.tokens, group.block_size)
            if part:
                assert match.tail is not None
                source = match.tail.blocks[i][whole - len(match.nodes) * self.granule // group.block_size]
                ops.append(
                    StateOp("copy", group.name, np.array([source]), np.array(held[group.name][whole : whole + 1]))
                )
        for group in self.single if match.snapshot is not None else ():
            assert match.snapshot is not None
            source, target = match.snapshot.blocks[group.name], held[group.name][0]
            if source != target:
                ops.append(StateOp("copy", group.name, np.array([source]), np.array([target]), length=match.tokens))
            if match.tokens < match.snapshot.length:
                ops.append(StateOp("truncate", group.name, np.array([target]), none, length=match.tokens))
        return ops

    def _unpin(self, match: Match) -> None:
        """Let go of what was held for copying; a snapshot that was taken over is no longer the cache's."""
        if match.tail is not None:
            self.tree.unpin(match.tail)
        if (snapshot := match.snapshot) is not None:
            snapshot.pins -= 1
            for node in snapshot.path:
                self.tree.unpin(node)

    # --- keeping -----------------------------------------------------------------------------------------------

    def progress(self, seq_id: int, computed: int) -> None:
        """Steps that have been submitted compute a sequence's first ``computed`` tokens: later steps may use them."""
        chain = self._chains.get(seq_id)
        if chain is None:
            return
        while chain.fresh < len(chain.nodes):
            node = chain.nodes[chain.fresh]
            if chain.fresh * self.granule + node.tokens > computed:
                break
            if node.owner == seq_id:
                node.owner = None
            chain.fresh += 1
        if chain.snapshot is not None:
            chain.snapshot.length = min(computed, len(chain.snapshot.tokens))

    def leave(self, seq_id: int, tokens: IntArray, *, exact: bool = True) -> None:
        """A sequence is about to release its blocks, whose states are those of ``tokens`` (if not ``exact``, and of a
        few more); the cache keeps them."""
        chain = self._chains.pop(seq_id, None)
        if chain is None:
            return
        if chain.snapshot is not None:
            self._unregister(chain.snapshot)
        held = self.allocator.held(seq_id)
        while chain.nodes and (chain.nodes[-1].owner == seq_id or chain.nodes[-1].tokens < self.granule):
            node = chain.nodes.pop()
            start = len(chain.nodes) * self.granule
            # Its own last block goes on in a longer chunk: two nodes of one block would count it twice.
            own = any(held[g.name][start // g.block_size] == b[0] for g, b in zip(self.paged, node.blocks))
            idle = node.users == 1 and not node.snapshots
            if node.parent is not None and (node.owner == seq_id or own or idle):
                self._remove(node)
            self.tree.unpin(node)
        self._grow(seq_id, chain, tokens, None)
        if self.single and chain.open and chain.nodes and (exact or self.shortens):
            self._keep_snapshot(seq_id, chain, tokens)
        for node in chain.nodes:
            self.tree.unpin(node)
        self._tidy(chain.nodes)
        self.tree.unpin(chain.root)

    def reclaim(self, missing: Mapping[str, int]) -> None:
        """Give up what was used longest ago until that many blocks are free; nothing if there is not enough."""
        if not self._can_free(missing):
            return
        paged = {g.name for g in self.paged}
        for name, count in missing.items():
            while self.allocator.pools[name].free < count:
                if name not in paged:
                    self._drop(self.idle_snapshots()[0])
                elif (node := self.tree.oldest()) is not None:
                    self._remove(node)
                else:
                    return

    def clear(self) -> None:
        """Give up everything no running sequence uses."""
        for snapshot in self.idle_snapshots():
            self._drop(snapshot)
        while (node := self.tree.oldest()) is not None:
            self._remove(node)

    def idle_snapshots(self) -> list[Snapshot]:
        """Snapshots that nobody is about to copy, oldest first."""
        return [s for s in self._snapshots if not s.pins]

    def cached(self) -> dict[str, int]:
        """Blocks by group that could be given up at once."""
        idle = {g.name: self.tree.idle[i] for i, g in enumerate(self.paged)}
        spare = len(self.idle_snapshots())
        return idle | {g.name: spare for g in self.single}

    def _can_free(self, missing: Mapping[str, int]) -> bool:
        cached = self.cached()
        return all(self.allocator.pools[name].free + cached[name] >= count for name, count in missing.items())

    def _grow(self, seq_id: int, chain: _Chain, tokens: IntArray, owner: int | None) -> None:
        """Lead the chain on over ``tokens``; chunks that another sequence is computing end it."""
        if not chain.open:
            return
        held, pools, data = self.allocator.held(seq_id), self.allocator.pools, tokens.tobytes()
        tables = [(held[g.name], g.block_size, pools[g.name]) for g in self.paged]
        parent = chain.nodes[-1] if chain.nodes else chain.root
        for start in range(len(chain.nodes) * self.granule, len(tokens), self.granule):
            stop = start + self.granule
            if stop > len(tokens):
                if not (self.paged and self.partial):
                    return
                stop = len(tokens)
            key = data[start * TOKEN_BYTES : stop * TOKEN_BYTES]
            child = parent.children.get(key)
            if child is None:
                blocks = tuple([tuple(table[start // size : -(-stop // size)]) for table, size, _ in tables])
                for (_, _, pool), some in zip(tables, blocks):
                    pool.share(some)
                child = self.tree.attach(parent, key, blocks, owner)
            elif child.owner is not None:
                chain.open = False
                return
            else:
                self.tree.pin(child)
            chain.nodes.append(child)
            parent = child

    def _keep_snapshot(self, seq_id: int, chain: _Chain, tokens: IntArray) -> None:
        """The sequence's one-block states become the cache's, in place of those they make superfluous."""
        for old in [s for s in chain.nodes[-1].snapshots if not s.live and not s.pins]:
            shared = common(old.tokens, tokens) == old.length
            if shared and (old.length == len(tokens) or self.shortens):
                self._drop(old)
        held = self.allocator.held(seq_id)
        blocks = {g.name: held[g.name][0] for g in self.single}
        for name, block in blocks.items():
            self.allocator.pools[name].share([block])
        self._snapshots[self._register(Snapshot(tokens, len(tokens), blocks, chain.nodes, False))] = None

    def _register(self, snapshot: Snapshot) -> Snapshot:
        for node in snapshot.path:
            node.snapshots[snapshot] = None
        return snapshot

    def _unregister(self, snapshot: Snapshot) -> None:
        for node in snapshot.path:
            node.snapshots.pop(snapshot, None)

    def _drop(self, snapshot: Snapshot) -> None:
        """Give up a snapshot."""
        del self._snapshots[snapshot]
        self._unregister(snapshot)
        for name, block in snapshot.blocks.items():
            self.allocator.pools[name].give([block])
        self._tidy(snapshot.path)

    def _remove(self, node: Node) -> None:
        """Give up a leaf."""
        for snapshot in [s for s in node.snapshots if not s.live]:
            self._drop(snapshot)
        if node.parent is None:  # the snapshot was all that kept it
            return
        self.tree.detach(node)
        for group, blocks in zip(self.paged, node.blocks):
            self.allocator.pools[group.name].give(blocks)

    def _tidy(self, path: Sequence[Node]) -> None:
        """Without paged groups, chunks are worth nothing once no snapshot leads through them."""
        if self.paged:
            return
        for node in reversed(path):
            if node.parent is not None and not (node.children or node.users or node.snapshots):
                self.tree.detach(node)
