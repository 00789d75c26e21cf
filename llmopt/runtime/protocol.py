"""The typed step protocol between engine and executor (numpy only)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from llmopt.program import StatePlan

IntArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float32]

NO_TOKEN = -2
"""Drawn where a mask, or a bias of minus infinity, leaves nothing to draw: that request cannot go on, others can."""


@dataclass(frozen=True)
class SamplingParams:
    """How a sequence's next tokens are drawn. temperature 0 is greedy; top_k 0 and top_p 1 are off.

    Penalties follow OpenAI (presence, frequency: output tokens) and CTRL (repetition: prompt and output).
    ``seed`` makes draws reproducible: token at position p uses Philox(key=seed, counter=p).
    ``logprobs``: None, or how many alternatives to report beside the chosen token (0 = chosen only).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None


@dataclass(frozen=True)
class Admission:
    """A sequence the executor hears of for the first time: its prompt (and, after preemption, output so far)."""

    seq_id: int
    prompt: IntArray
    sampling: SamplingParams
    output: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))


@dataclass(frozen=True)
class SeqStep:
    """One sequence's part of a step.

    ``tokens``: (query_len,) ids, or None for one row whose id is the sequence's last sampled token.
    ``start``: position of the first row = tokens of the sequence already in the state.
    ``blocks``: block ids by state group, in position order, covering ``start + query_len`` tokens.
    ``logits``: rows whose logits the caller wants back: ``none``, ``last`` or ``all``.
    ``sample``: draw the next token from the last row. ``rope_len``: length that selects the rotary
    table of a two-table (longrope) model. ``positions``: explicit positions (trees); None is start, start+1, …
    ``tree``: (query_len, query_len) bool ancestor mask among the new rows; None is causal.
    """

    seq_id: int
    tokens: IntArray | None
    start: int
    blocks: Mapping[str, IntArray]
    sample: bool = False
    logits: Literal["none", "last", "all"] = "none"
    rope_len: int = 0
    positions: IntArray | None = None
    tree: npt.NDArray[np.bool_] | None = None

    @property
    def query_len(self) -> int:
        """Rows of this sequence in the step."""
        return 1 if self.tokens is None else len(self.tokens)


@dataclass(frozen=True)
class DecodeRows:
    """Sequences that take one row each, as arrays: the last sampled token goes in, the next one is drawn.

    ``seq_ids`` (n,) int64, ``starts`` (n,) int64 the rows' positions, ``rope_lens`` (n,) int64 as in SeqStep.
    ``blocks``: by state group (n, W) int32; the first ``group.blocks_for(start + 1)`` entries of a row count.
    """

    seq_ids: IntArray
    starts: IntArray
    rope_lens: IntArray
    blocks: Mapping[str, npt.NDArray[np.int32]]

    def __len__(self) -> int:
        return len(self.seq_ids)

    def expanded(self, states: StatePlan) -> Iterator[SeqStep]:
        """The same rows one by one, for executors that treat every row alike."""
        seq_ids, starts, rope_lens = self.seq_ids.tolist(), self.starts.tolist(), self.rope_lens.tolist()
        for i, (seq_id, start, rope_len) in enumerate(zip(seq_ids, starts, rope_lens)):
            tables = {g.name: self.blocks[g.name][i, : g.blocks_for(start + 1)].astype(np.int64) for g in states.groups}
            yield SeqStep(seq_id, None, start, tables, sample=True, rope_len=rope_len)


@dataclass(frozen=True)
class StateOp:
    """A state operation done, in order, before the step's rows.

    ``copy`` and ``move``: blocks ``source`` of a group to blocks ``target``, on the device; of their tokens the first
    ``length`` matter (0: all). ``swap_out``: blocks
    ``source``, which stay as they are, to a host buffer named by group and ``key``; ``swap_in``: that buffer, which
    ends, to blocks ``target``; ``swap_drop``: the buffer ends unused. ``truncate``: blocks ``source`` hold ``length``
    tokens from now on.
    """

    kind: Literal["copy", "move", "swap_out", "swap_in", "swap_drop", "truncate"]
    group: str
    source: IntArray
    target: IntArray
    key: int = 0
    length: int = 0


@dataclass(frozen=True)
class StepBatch:
    """One step: sequences admitted and released, ordered state operations, then the rows.

    ``decode`` holds the plain decode rows, ``rows`` all others; a sequence is in one of the two.
    """

    rows: tuple[SeqStep, ...]
    admit: tuple[Admission, ...] = ()
    release: tuple[int, ...] = ()
    ops: tuple[StateOp, ...] = ()
    masks: Mapping[int, npt.NDArray[np.uint32]] = field(default_factory=dict)
    """Grammar bitmask by sequence: (ceil(vocab/32),) uint32, bit set = token allowed. Which sequences have one is known
    at once; reading one may wait until it is, so an executor reads them when its forward pass is on its way."""
    decode: DecodeRows | None = None

    def all_rows(self, states: StatePlan) -> tuple[SeqStep, ...]:
        """Every row of the step, decode rows first."""
        return self.rows if self.decode is None else (*self.decode.expanded(states), *self.rows)


@dataclass(slots=True)
class Sampled:
    """A drawn token, or NO_TOKEN; ``top`` lists (token id, logprob) alternatives, best first. Not frozen: that takes
    three times as long to make, and one is made for every token."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class StepOutput:
    """Results by sequence id. ``logits``: (rows, vocab) float32 for sequences that asked.

    ``tokens``: (n,) int64 ids or NO_TOKEN, drawn by the step's ``decode`` rows in their order; None when ``sampled``
    has them all. A row that is also in ``sampled`` counts as that.
    """

    sampled: Mapping[int, Sampled]
    logits: Mapping[int, FloatArray] = field(default_factory=dict)
    tokens: IntArray | None = None


@dataclass(frozen=True)
class ExecutorLimits:
    """What an executor was loaded for. ``blocks``: blocks available by state group.

    ``steps_in_flight``: 1 when every step must be collected before the next is submitted, 2 when the host may run
    one step ahead. ``ranged``: calls cover a range of blocks, so that sequences with one block each should be close.
    ``spare_core``: ``submit`` computes without the interpreter and leaves the host a core meanwhile.
    ``row_buckets``: rows that a step with prompt tokens is padded to, smallest first; none where it takes its own rows.
    """

    max_context: int
    max_sequences: int
    max_tokens_per_step: int
    blocks: Mapping[str, int]
    vocab_size: int
    rope_switch: int | None = None
    steps_in_flight: int = 1
    ranged: bool = False
    spare_core: bool = False
    row_buckets: tuple[int, ...] = ()


class Executor(Protocol):
    """Runs steps of one artifact on one device. Not thread-safe: one engine drives it."""

    state_plan: StatePlan
    limits: ExecutorLimits

    def submit(self, batch: StepBatch) -> int:
        """Start a step and return its ticket; steps run in submission order."""
        ...

    def collect(self, ticket: int) -> StepOutput:
        """Wait for a step. Raises ExecutorError when it failed."""
        ...

    def close(self) -> None:
        """Free the device's memory; idempotent."""
        ...
