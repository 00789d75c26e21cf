"""The tree behind the prefix cache: chunks of tokens with the blocks that hold their states, oldest out first."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator, Sequence
from itertools import count

import numpy as np

from llmopt.runtime.protocol import IntArray

TOKEN_BYTES = 8
SCANNED = 32
"""Children compared token by token for a partly matching chunk; newest first."""


class Node:
    """A chunk of tokens after its parent's. ``blocks``: by paged group, in position order.

    ``owner``: the sequence still computing it, None once its states are there. ``users``: sequences whose path leads
    through it; it stays while there are any. A node without a parent is no longer in the tree.
    """

    __slots__ = ("blocks", "children", "key", "owner", "parent", "snapshots", "stamp", "users")

    def __init__(self, parent: Node | None, key: bytes, blocks: tuple[tuple[int, ...], ...], owner: int | None) -> None:
        self.parent, self.key, self.blocks, self.owner = parent, key, blocks, owner
        self.children: dict[bytes, Node] = {}
        self.snapshots: dict[Snapshot, None] = {}
        self.users = self.stamp = 0

    @property
    def tokens(self) -> int:
        """Tokens of the chunk."""
        return len(self.key) // TOKEN_BYTES

    @property
    def usable(self) -> bool:
        """Whether its blocks hold its states: they are there, and nobody else was given the blocks since."""
        return self.owner is None and self.parent is not None

    @property
    def settled(self) -> bool:
        """Whether waiting for it makes no sense any more: its states are there, or it left the tree."""
        return self.owner is None or self.parent is None


class Snapshot:
    """The state of a whole sequence in the groups that keep one block each, after ``length`` tokens.

    ``blocks``: by group name. ``live``: the block belongs to a running sequence, which may only be copied from.
    """

    __slots__ = ("blocks", "length", "live", "path", "pins", "tokens")

    def __init__(self, tokens: IntArray, length: int, blocks: dict[str, int], path: Sequence[Node], live: bool) -> None:
        self.tokens, self.length, self.blocks, self.live = tokens, length, blocks, live
        self.path, self.pins = tuple(path), 0


def common(a: IntArray, b: IntArray) -> int:
    """Length of the common prefix of two token arrays."""
    size = min(len(a), len(b))
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if len(different) else size


class Radix:
    """Roots by salt (only while they have children or users), nodes by their exact tokens (the dictionaries hash
    them), leaves without users in order of their last use."""

    def __init__(self, granule: int, groups: int) -> None:
        self.granule = granule
        self._roots: dict[Hashable, Node] = {}
        self._salts: dict[Node, Hashable] = {}
        self.idle = [0] * groups
        """Blocks by paged group in nodes without users."""
        self.size = 0
        self._leaves: list[tuple[int, int, Node]] = []
        self._clock = count(1)

    def find(self, salt: Hashable) -> Node | None:
        """The root for a salt, if there is one."""
        return self._roots.get(salt)

    def root(self, salt: Hashable) -> Node:
        """The root for a salt, made when there is none."""
        if salt not in self._roots:
            root = self._roots[salt] = Node(None, b"", (), None)
            self._salts[root] = salt
        return self._roots[salt]

    def descend(self, node: Node, tokens: IntArray, limit: int) -> Iterator[Node]:
        """Whole chunks of ``tokens[:limit]`` below a root, as far as they are in the tree."""
        data, size = tokens[:limit].tobytes(), self.granule * TOKEN_BYTES
        for start in range(0, len(data) - size + 1, size):
            child = node.children.get(data[start : start + size])
            if child is None:
                return
            yield child
            node = child

    def nearest(self, node: Node, rest: IntArray) -> tuple[Node | None, int]:
        """The child that shares most tokens with ``rest``, and how many."""
        best, shared, head = None, 0, rest[:1].tobytes()
        for scanned, (key, child) in enumerate(reversed(node.children.items())):
            if scanned == SCANNED:
                break
            if key.startswith(head) and (found := common(np.frombuffer(key, np.int64), rest)) > shared:
                best, shared = child, found
        return best, shared

    def attach(self, parent: Node, key: bytes, blocks: tuple[tuple[int, ...], ...], owner: int | None) -> Node:
        """A new child with one user."""
        child = parent.children[key] = Node(parent, key, blocks, owner)
        child.users = 1
        self.size += 1
        return child

    def pin(self, node: Node) -> None:
        """One more user."""
        node.users += 1
        if node.users == 1:
            self._count(node, -1)

    def unpin(self, node: Node) -> None:
        """A user less; the node is now the most recently used."""
        node.users -= 1
        node.stamp = next(self._clock)
        if node.users == 0 and node.parent is not None:
            self._count(node, 1)
        self._offer(node)

    def detach(self, node: Node) -> None:
        """Take a leaf out of the tree. Its users, if any, keep what they have."""
        parent = node.parent
        assert parent is not None
        assert not node.children
        del parent.children[node.key]
        node.parent = None
        self.size -= 1
        if node.users == 0:
            self._count(node, -1)
        self._offer(parent)

    def oldest(self) -> Node | None:
        """The leaf without users that was used longest ago; it is not offered again."""
        while self._leaves:
            stamp, _, node = heapq.heappop(self._leaves)
            if _current(stamp, node):
                return node
        return None

    def _offer(self, node: Node) -> None:
        if node in self._salts and not node.children and not node.users:
            del self._roots[self._salts.pop(node)]
        elif _current(node.stamp, node):
            heapq.heappush(self._leaves, (node.stamp, next(self._clock), node))
        if len(self._leaves) > 64 + 2 * self.size:  # entries of nodes used again since
            self._leaves = [entry for entry in self._leaves if _current(entry[0], entry[2])]
            heapq.heapify(self._leaves)

    def _count(self, node: Node, sign: int) -> None:
        for i, blocks in enumerate(node.blocks):
            self.idle[i] += sign * len(blocks)


def _current(stamp: int, node: Node) -> bool:
    """Whether a node is a leaf without users that has not been used since ``stamp``."""
    return node.stamp == stamp and node.parent is not None and not node.children and not node.users
