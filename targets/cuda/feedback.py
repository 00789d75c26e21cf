"""Drawing and token feedback: what a function gains so that the next step's tokens need not pass through the host.

``last_tokens`` keeps each sequence's last drawn token by sequence place. Ids below zero name a place: ``feed_tokens``
replaces them. ``greedy`` and ``sample`` draw from the logits of the rows that have a place and store what they drew;
the runtime runs one of the two.
"""

from __future__ import annotations

from dataclasses import replace

from llmopt.launch import MAX_BIASES, RECORD_WORDS, REPORT_WORDS
from llmopt.program import Arg, Function, OpCall, Ref, TensorType

FEED, GREEDY, SAMPLE = "llmopt.feed_tokens", "llmopt.greedy", "llmopt.sample"
LAST, SLOTS, DRAWN, FED = "last_tokens", "sample_slots", "sampled", "fed_ids"
POSITIONS, MASK_ROWS, REPORTS = "sample_positions", "mask_rows", "reports"
KEPT = (LAST, "records", "history", "bias_ids", "bias_values", "masks")
"""Buffers that outlive steps, a row for each place."""


def with_feedback(function: Function, places: int) -> Function:
    """The function between a first call that fills in tokens and two last ones that draw.

    New inputs (M,) int32: ``sample_slots``, the place of a row that draws, -1 for the others; ``sample_positions`` of
    the tokens to draw; ``mask_rows``, a row's mask among ``masks``, -1 for none. New outputs: ``sampled`` (M,) int32,
    below zero where nothing could be drawn, and ``reports`` (M, REPORT_WORDS) int32, written by ``sample`` alone.
    """
    logits = function.outputs[0]
    vocabulary = function.types[logits].shape[-1]
    assert isinstance(vocabulary, int), "the vocabulary has one size"
    rows = TensorType(("M",), "int32")
    types = {
        **function.types,
        **dict.fromkeys((SLOTS, POSITIONS, MASK_ROWS, DRAWN), rows),
        REPORTS: TensorType(("M", REPORT_WORDS), "int32"),
        FED: function.types["input_ids"],
        LAST: TensorType((places,), "int32"),
        "records": TensorType((places, RECORD_WORDS), "int32"),
        "history": TensorType((places, vocabulary), "int16"),
        "bias_ids": TensorType((places, MAX_BIASES), "int32"),
        "bias_values": TensorType((places, MAX_BIASES), "float32"),
        "masks": TensorType((places, -(-vocabulary // 32)), "int32"),
    }
    feed = OpCall(FEED, {"ids": Ref("input_ids"), "last": Ref(LAST)}, (FED,))
    both: dict[str, Arg] = {"logits": Ref(logits), "slots": Ref(SLOTS), "last": Ref(LAST)}
    kept: dict[str, Arg] = {name: Ref(name) for name in KEPT if name != LAST}
    inputs: dict[str, Arg] = {"positions": Ref(POSITIONS), "mask_rows": Ref(MASK_ROWS), "out": Ref(DRAWN)}
    greedy = OpCall(GREEDY, both, (DRAWN,), "sampler")
    sample = OpCall(SAMPLE, {**both, **kept, **inputs}, (REPORTS,), "sampler")
    calls = tuple(replace(call, args={k: fed(arg) for k, arg in call.args.items()}) for call in function.calls)
    return replace(
        function,
        inputs=(*function.inputs, SLOTS, POSITIONS, MASK_ROWS),
        calls=(feed, *calls, greedy, sample),
        outputs=(*function.outputs, DRAWN, REPORTS),
        types=types,
    )


def fed(arg: Arg) -> Arg:
    """An argument that read the ids as sent now reads them as fed."""
    if isinstance(arg, tuple):
        return tuple(fed(item) for item in arg)
    return Ref(FED) if arg == Ref("input_ids") else arg
