"""Driver, scores and bench over an executor whose logits are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import yaml

from llmopt.errors import ConfigError, RequestError
from llmopt.program import StateGroup, StatePlan, StateSpec
from llmopt.recipe import load_recipe
from llmopt.report.bench import Shape, append_rows, one_run, summary
from llmopt.report.drive import Driver
from llmopt.report.evaluate import score, split_windows, summarize
from llmopt.report.machine import peak_memory, read_bandwidth
from llmopt.runtime.protocol import ExecutorLimits, Sampled, StepBatch, StepOutput

VOCAB = 7


class Counting:
    """Predicts token + 1 (mod VOCAB) with a logit of ``sharpness``; checks what the protocol promises."""

    def __init__(self, sharpness: float = 2.0, kind: str = "paged", chunk: int = 8, vocab: int = VOCAB) -> None:
        size, window = (4, None) if kind == "paged" else (24, 20)
        group = StateGroup("kv", kind, size, (StateSpec("k_0", 1, 1, "float32", 0),), window=window)
        self.state_plan = StatePlan((group,))
        self.limits = ExecutorLimits(64, 4, chunk, {"kv": 32 if kind == "paged" else 3}, vocab)
        self.sharpness, self.last, self.length, self.batches = sharpness, {}, {}, []

    def submit(self, batch: StepBatch) -> int:
        self.batches.append(batch)
        for admission in batch.admit:
            self.last[admission.seq_id], self.length[admission.seq_id] = int(admission.prompt[-1]), 0
        owned = [tuple(r.blocks["kv"]) for r in batch.rows]
        assert len(set(sum(owned, ()))) == sum(map(len, owned)), "two sequences share a block"
        for row in batch.rows:
            assert row.start == self.length[row.seq_id]
            self.length[row.seq_id] += row.query_len
        for seq_id in batch.release:
            del self.last[seq_id], self.length[seq_id]
        return len(self.batches) - 1

    def collect(self, ticket: int) -> StepOutput:
        sampled, logits = {}, {}
        for row in self.batches[ticket].rows:
            tokens = np.array([self.last[row.seq_id]]) if row.tokens is None else row.tokens
            if row.logits == "all":
                logits[row.seq_id] = self.sharpness * np.eye(VOCAB, dtype=np.float32)[(tokens + 1) % VOCAB]
            if row.sample:
                self.last[row.seq_id] = int(tokens[-1] + 1) % VOCAB
                sampled[row.seq_id] = Sampled(self.last[row.seq_id])
        return StepOutput(sampled, logits)

    def close(self) -> None:
        pass


def counting_text(windows: int, window: int) -> np.ndarray:
    return split_windows(np.arange(windows * window + 1) % VOCAB, window)


@pytest.mark.parametrize(("kind", "chunk"), [("paged", 8), ("paged", 3), ("ring", 8)])
def test_scores_of_known_logits(kind, chunk):
    """Every token is predicted right with the same logit, whatever the chunks."""
    result = summarize(score(Counting(2.0, kind, chunk), counting_text(3, 20)))
    expected = math.log(math.exp(2) + VOCAB - 1) - 2
    assert result["scored_tokens"] == 3 * 20
    assert result["perplexity"] == pytest.approx(math.exp(expected))


def test_scores_against_a_baseline():
    base = summarize(score(Counting(1.0), counting_text(4, 16), baseline=Counting(2.0, chunk=5)))["baseline"]
    p, q = (np.exp([s] + [0] * (VOCAB - 1)) / (math.exp(s) + VOCAB - 1) for s in (2.0, 1.0))
    assert base["kl_mean"] == pytest.approx(float((p * np.log(p / q)).sum()))
    assert base["kl_p99"] == pytest.approx(base["kl_mean"])
    assert base["top1_agreement"] == 1
    assert base["change"]["value"] == pytest.approx(p[0] / q[0] - 1)
    flipped = summarize(score(Counting(-1.0), counting_text(4, 16), baseline=Counting(2.0)))["baseline"]
    assert flipped["top1_agreement"] == 0


def test_vocabularies_must_agree():
    with pytest.raises(ConfigError, match="7 and 8"):
        score(Counting(), counting_text(1, 8), baseline=Counting(vocab=8))


def test_windows_overlap_by_the_token_that_is_scored_and_then_fed():
    assert split_windows(np.arange(10), 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert split_windows(np.arange(9), 3).shape == (2, 4)
    assert split_windows(np.arange(10), 3, tokens=6).shape == (2, 4)
    with pytest.raises(RequestError, match="3 tokens"):
        split_windows(np.arange(3), 3)


def test_a_bench_run_prefills_then_decodes_all_together():
    executor = Counting()
    first, steps = one_run(Driver(executor, 12), Shape(3, 9, 3, 1), seed=0)
    assert (len(first), len(steps)) == (3, 2)
    assert [len(b.rows) for b in executor.batches] == [1, 1] * 3 + [3, 3, 0]
    assert not executor.length
    assert all(row.sample for batch in executor.batches[-3:] for row in batch.rows)


def test_no_room_is_a_typed_error():
    with pytest.raises(ConfigError, match="context of 64"):
        Driver(Counting(), 65)
    with pytest.raises(ConfigError, match="room for 2 sequences of 64 tokens, not 3"):
        Driver(Counting(), 64).require(3)


def test_rows_are_appended(tmp_path):
    path = tmp_path / "rows" / "cpu.jsonl"
    append_rows(path, [{"ms": 1.5}])
    append_rows(path, [{"ms": 2.5}])
    assert path.read_text() == '{"ms": 1.5}\n{"ms": 2.5}\n'


def test_a_recipe_in_a_few_words():
    assert summary({"dtype": "float32", "passes": ["fuse_qkv"]}) == "float32"
    body = {"quantize_weights": {"bits": 4, "group_size": 32}}
    head = {"quantize_weights": {"bits": 8, "lm_head": True}}
    assert summary({"dtype": "float32", "passes": ["fuse_qkv", body, head]}) == "float32, int4 g32, head int8"
    assert summary(yaml.safe_load(load_recipe("fp8-cuda").text)) == "bfloat16, fp8, activations fp8"
    fast = {"dtype": "bfloat16", "passes": [], "target_options": {"fp8_fast_accumulation": "prefill"}}
    assert summary(fast) == "bfloat16, fast accumulation prefill"
    assert summary(yaml.safe_load(load_recipe("w8a8-cuda").text)) == "bfloat16, int8, activations int8"
    assert summary(yaml.safe_load(load_recipe("bf16-kv8-cuda").text)) == "bfloat16, kv fp8"
    assert summary(yaml.safe_load(load_recipe("int4-gptq-cpu").text)).startswith("float32, gptq int4 g")


def test_the_machine_is_measured():
    assert read_bandwidth(1, size=8 << 20, repeat=2) > 1e8
    before = peak_memory()
    touched = np.ones(before + (64 << 20), np.uint8)
    assert peak_memory() > touched.nbytes
