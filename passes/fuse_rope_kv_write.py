"""Fuses the rotation of q and k with the write of k and v into the KV state."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from llmopt.errors import PassError
from llmopt.ir.module import Module
from llmopt.ir.pass_manager import Pass, PassContext
from llmopt.ir.rewrite import Op, Var, arguments, call, dialect, match, precedes, results, sweep

KEY = Op((dialect.rope.default,), (Var("k"), Var("cos"), Var("sin"), Var("interleaved")), name="rope_k")
WRITE = Op((dialect.kv_write.default,), (Var("k_state"), Var("v_state"), KEY, Var("v"), Var("slots")))
QUERY = Op((dialect.rope.default,), (Var("q"), Var("cos"), Var("sin"), Var("interleaved")))


@dataclass(frozen=True)
class FuseRopeKvWrite(Pass):
    """Matches ``kv_write`` of a rotated k whose state is read by the attention of a q rotated by the same table.

    Replaces both ropes and the write with ``llmopt.rope_kv_write``.
    """

    name: ClassVar[str] = "fuse_rope_kv_write"

    def requires(self, module: Module, ctx: PassContext) -> None:
        """KV states: raises PassError when rewrite_kv_cache has not run."""
        if not module.states:
            raise PassError("rewrite_kv_cache must come before fuse_rope_kv_write", where="pass fuse_rope_kv_write")

    def run(self, module: Module, ctx: PassContext) -> int:
        """One rewrite a layer."""
        count = 0
        for function in self.served(module):
            for node in function.graph.find_nodes(op="call_function", target=dialect.kv_write.default):
                count += self._fuse(module, function, node)
            sweep(function)
        return count

    def _fuse(self, module: Module, function: fx.GraphModule, write: fx.Node) -> bool:
        found = match(WRITE, write)
        query = rotated_query(write)
        if found is None or query is None:
            return False
        rotation = match(QUERY, query)
        if rotation is None or any(rotation[n] is not found[n] for n in ("cos", "sin", "interleaved")):
            return False
        # q may be rotated after the write: the fused call goes where everything it reads is ready
        place = write if precedes(query, write) else query
        users = [user for node in (*write.users, query) for user in (node.users if node is not query else query.users)]
        if any(not precedes(place, user) for user in users):
            return False
        names = ("k", "v", "cos", "sin", "k_state", "v_state", "slots", "interleaved")
        with function.graph.inserting_before(place):
            scales = [scale for scale in arguments(write)[5:] if scale is not None]
            operands = [rotation["q"], *(found[n] for n in names), *scales]
            fused = call(function, module, dialect.rope_kv_write.default, *operands, like=write)
        rotated, *states = results(function, fused)
        query.replace_all_uses_with(rotated)
        for taken in list(write.users):
            taken.replace_all_uses_with(states[taken.args[1]])  # type: ignore[index]
        return True


def rotated_query(write: fx.Node) -> fx.Node | None:
    """The q of the one attention that reads the written states, when a rope makes it."""
    states = [user for user in write.users if user.target is operator.getitem]
    readers = {u for s in states for u in s.users if u.target is dialect.cached_attention.default}
    if len(readers) != 1:
        return None
    query: Any = next(iter(readers)).args[0]
    return query if isinstance(query, fx.Node) and query.target is dialect.rope.default else None


PASS = FuseRopeKvWrite
