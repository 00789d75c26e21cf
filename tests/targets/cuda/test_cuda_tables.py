"""Block tables on their way to the device: sent when they change, left alone when they don't."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmopt.artifact import Artifact, WeightsPlan
from llmopt.runtime.executors.cuda import CudaExecutor, driver, load
from llmopt.runtime.protocol import Admission, SamplingParams, SeqStep, StepBatch
from llmopt.runtime.state import StateAllocator
from llmopt.target import LoadOptions
from tests.captured import checkpoint
from tests.targets.cuda.fake_builds import compile_without_compiler
from tests.targets.cuda.fake_driver import FakeDriver

PAGE = 64


class Sequences:
    """Sequences of one token a step, in step, on a driver that counts."""

    def __init__(self, executor: CudaExecutor, fake: FakeDriver) -> None:
        self.executor, self.fake, self.length = executor, fake, 0
        self.allocator = StateAllocator(executor.state_plan, executor.limits.blocks)

    def start(self, seq_ids: tuple[int, ...], length: int) -> int:
        """Tables sent by a step of prompts."""
        prompt = np.arange(length) % 50
        self.length = length
        rows = []
        for seq_id in seq_ids:
            assert self.allocator.extend(seq_id, length)
            rows.append(SeqStep(seq_id, prompt, 0, self.allocator.table(seq_id, length), sample=True))
        admit = tuple(Admission(seq_id, prompt, SamplingParams(temperature=0)) for seq_id in seq_ids)
        return self._sent(StepBatch(tuple(rows), admit=admit))

    def decode(self, seq_ids: tuple[int, ...]) -> int:
        """Tables sent by a step of a token each."""
        rows = []
        for seq_id in seq_ids:
            assert self.allocator.extend(seq_id, self.length + 1)
            table = self.allocator.table(seq_id, self.length + 1)
            rows.append(SeqStep(seq_id, None, self.length, table, sample=True))
        self.length += 1
        return self._sent(StepBatch(tuple(rows)))

    def _sent(self, step: StepBatch) -> int:
        before = self.fake.calls.count("cuMemcpy2DAsync")
        self.executor.collect(self.executor.submit(step))
        return self.fake.calls.count("cuMemcpy2DAsync") - before


def test_a_table_goes_up_when_it_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = compile_without_compiler(checkpoint("llama"), tmp_path / "a", WeightsPlan("random"), max_context=128)
    monkeypatch.setattr(driver, "cu", fake := FakeDriver())
    executor = load(Artifact.open(made), LoadOptions("cuda", max_sequences=2, max_context=128))
    assert isinstance(executor, CudaExecutor)
    work = Sequences(executor, fake)
    assert work.start((1, 2), PAGE - 2) > 0
    both, one = (1, 2), (2,)
    assert [work.decode(both) for _ in range(4)] == [1, 0, 1, 0]  # the third token is the first of a second block
    assert [work.decode(ids) for ids in (one, one, both, both)] == [1, 0, 1, 0]
    executor.close()
