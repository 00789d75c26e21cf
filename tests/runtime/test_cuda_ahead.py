"""The engine over the cuda executor: constrained sequences that run ahead, states that go to host memory and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llmopt.errors import RequestError
from llmopt.program import StateGroup
from llmopt.runtime.core import EngineCore
from llmopt.runtime.late import LateMasks
from llmopt.runtime.options import SchedulerOptions
from llmopt.runtime.params import GenerationParams, Grammar
from llmopt.runtime.protocol import Admission, IntArray, SamplingParams
from llmopt.runtime.sampler import HostSampler
from llmopt.runtime.swap import SwapOptions
from tests.runtime.cuda_formula import VOCAB, Formula, executor, formula, without
from tests.runtime.test_cuda_sequences import KINDS, PROMPTS

Mask = npt.NDArray[np.uint32]
SWAP = SchedulerOptions(swap=SwapOptions(bytes=1 << 20, bytes_per_second=1e12))
COUNT = 12


def mask_after(drawn: Sequence[int]) -> Mask:
    """Every third token, which third depending on all that was drawn."""
    allowed = (sum(drawn) + len(drawn)) % 3
    return without(*(token for token in range(VOCAB) if token % 3 != allowed))


class Thirds:
    """Constraints of that kind, in the place of the engine's grammars."""

    compiler = None

    def __init__(self) -> None:
        self.drawn: dict[int, list[int]] = {}

    def add(self, seq_id: int, grammar: Grammar) -> None:
        self.drawn[seq_id] = []

    def accept(self, tokens: Mapping[int, int]) -> Mapping[int, RequestError]:
        refused = {}
        for seq_id, token in tokens.items():
            if (before := self.drawn.get(seq_id)) is None:
                continue
            if token % 3 != (sum(before) + len(before)) % 3:
                refused[seq_id] = RequestError(f"token {token} is not of the third allowed")
            before.append(token)
        return refused

    def forget(self, seq_id: int) -> None:
        self.drawn.pop(seq_id, None)

    def masks(self, seq_ids: Sequence[int]) -> Mapping[int, Mask]:
        return {seq_id: mask_after(self.drawn[seq_id]) for seq_id in seq_ids if seq_id in self.drawn}


class Core(EngineCore):
    """An engine under those constraints. ``late``: steps whose masks came after their forward pass had begun."""

    def __init__(self, backend: Formula, ahead: int, options: SchedulerOptions | None = None) -> None:
        found = executor(backend)
        found.limits = replace(found.limits, steps_in_flight=ahead)
        super().__init__(found, options=options)
        self.constraints: Any = Thirds()
        self.late = 0

    def _masks(self, seq_ids: Sequence[int], number: int) -> Mapping[int, Mask]:
        masks = super()._masks(seq_ids, number)
        self.late += isinstance(masks, LateMasks)
        return masks


class Hasty(Core):
    """Negative control: takes the masks of the tokens it knows, not of those on their way."""

    def _masks(self, seq_ids: Sequence[int], number: int) -> Mapping[int, Mask]:
        return self.constraints.masks(seq_ids)  # type: ignore[no-any-return]


def params(index: int) -> GenerationParams:
    """Every way to draw in turn; two of three sequences are constrained."""
    sampling = SamplingParams(seed=index, **KINDS[index % len(KINDS)])
    grammar = Grammar("regex", "thirds") if index % 3 else None
    return GenerationParams(max_tokens=COUNT, sampling=sampling, ignore_eos=True, grammar=grammar)


def run(core: EngineCore) -> list[list[int]]:
    """Tokens of each of the prompts."""
    ids = [core.add(prompt, params(i)) for i, prompt in enumerate(PROMPTS)]
    tokens: dict[int, list[int]] = {i: [] for i in ids}
    while core.has_work:
        for output in core.step():
            tokens[output.request_id].append(output.sampled.token)
    return [tokens[i] for i in ids]


def alone() -> list[list[int]]:
    """What each draws alone, on the host."""
    found = []
    for i, prompt in enumerate(PROMPTS):
        sampler, drawn, chosen = HostSampler(VOCAB), list[int](), params(i)
        sampler.admit(Admission(0, np.array(prompt), chosen.sampling))
        for _ in range(COUNT):
            masks = {0: mask_after(drawn)} if chosen.grammar else None
            logits = formula(np.array([*prompt, *drawn]))[None]
            drawn.append(sampler.sample_rows([0], logits, masks)[0].token)
        found.append(drawn)
    return found


@pytest.mark.parametrize("ahead", [1, 2])
def test_constrained_sequences_that_run_ahead_draw_what_they_draw_alone(ahead: int) -> None:
    """Reading a late mask collects the step before, while ``submit`` of the next one is under way."""
    core = Core(Formula(), ahead)
    assert run(core) == alone()
    assert core.failures() == []
    assert (core.late > COUNT) == (ahead == 2)


def test_masks_of_an_older_token_would_not_do() -> None:
    core = Hasty(Formula(), 2)
    assert run(core) != alone()
    assert core.failures()


class Counting(Formula):
    """Counts blocks that go to the host and come back. ``loses``: they do not (negative control)."""

    def __init__(self, loses: bool = False) -> None:
        super().__init__(blocks=18)
        self.loses, self.out, self.back = loses, 0, 0

    def read_blocks(self, group: StateGroup, blocks: IntArray) -> list[npt.NDArray[np.uint8]]:
        self.out += len(blocks)
        return super().read_blocks(group, blocks)

    def write_blocks(self, group: StateGroup, blocks: IntArray, data: list[npt.NDArray[np.uint8]]) -> None:
        self.back += len(blocks)
        super().write_blocks(group, blocks, [np.zeros_like(data[0])] if self.loses else data)


@pytest.mark.parametrize("ahead", [1, 2])
def test_swapped_sequences_draw_what_they_draw_alone(ahead: int) -> None:
    backend = Counting()
    core = Core(backend, ahead, SWAP)
    assert run(core) == alone()
    stats = core.scheduler.stats()
    assert stats.swaps > 0
    assert stats.recomputes == 0
    assert backend.out == backend.back > 0
    assert core.executor.swapped == {}  # type: ignore[attr-defined]
    assert core.scheduler.swap.used == 0


def test_states_that_are_lost_on_the_way_show() -> None:
    assert run(Core(Counting(loses=True), 2, SWAP)) != alone()
