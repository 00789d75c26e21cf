"""Token feedback: what a function gains so that the next step's tokens need not pass through the host.

``last_tokens`` keeps each sequence's last drawn token by sequence slot. Ids below zero name a slot: ``feed_tokens``
replaces them. ``greedy`` draws from the logits of the rows that have a slot and stores what it drew.
"""

from __future__ import annotations

from dataclasses import replace

from llmopt.program import Arg, Function, OpCall, Ref, TensorType

FEED, GREEDY = "llmopt.feed_tokens", "llmopt.greedy"
LAST, SLOTS, DRAWN, FED = "last_tokens", "sample_slots", "sampled", "fed_ids"


def with_feedback(function: Function, slots: int) -> Function:
    """The function between a first call that fills in tokens and a last one that draws.

    New input ``sample_slots`` (M,) int32, -1 for rows that draw nothing; ``last_tokens`` (slots,) int32 stays on the
    device; new output ``sampled`` (M,) int32, -1 where nothing was drawn or the logits were not finite.
    """
    types = {
        **function.types,
        SLOTS: TensorType(("M",), "int32"),
        LAST: TensorType((slots,), "int32"),
        DRAWN: TensorType(("M",), "int32"),
        FED: function.types["input_ids"],
    }
    feed = OpCall(FEED, {"ids": Ref("input_ids"), "last": Ref(LAST)}, (FED,))
    draw = OpCall(
        GREEDY, {"logits": Ref(function.outputs[0]), "slots": Ref(SLOTS), "last": Ref(LAST)}, (DRAWN,), "sampler"
    )
    calls = tuple(replace(call, args={k: fed(arg) for k, arg in call.args.items()}) for call in function.calls)
    return replace(
        function,
        inputs=(*function.inputs, SLOTS),
        calls=(feed, *calls, draw),
        outputs=(*function.outputs, DRAWN),
        types=types,
    )


def fed(arg: Arg) -> Arg:
    """An argument that read the ids as sent now reads them as fed."""
    if isinstance(arg, tuple):
        return tuple(fed(item) for item in arg)
    return Ref(FED) if arg == Ref("input_ids") else arg
