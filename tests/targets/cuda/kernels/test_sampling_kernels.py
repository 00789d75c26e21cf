"""Sampling on the device against the host sampler: the same tokens for the same logits, seeds and positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from llmopt.errors import ExecutorError
from llmopt.launch import MAX_BIASES, RECORD_WORDS, REPORT_WORDS, SAMPLING_RECORD
from llmopt.runtime.executors.cuda.drawing import place_rows, reported
from llmopt.runtime.philox import uniforms
from llmopt.runtime.protocol import NO_TOKEN, Admission, Sampled, SamplingParams
from llmopt.runtime.sampler import HostSampler
from targets.cuda.kernels import _edit, sample
from tests.targets.cuda.kernels.harness import run

V = 5000
"""Three stretches, the last one not full."""

WORDS = -(-V // 32)
OFF = SamplingParams(temperature=1.0, seed=11)
Mask = npt.NDArray[np.uint32]


@dataclass
class Drawn:
    """What the device drew, and the state it leaves."""

    sampled: list[Sampled]
    last: Tensor
    history: Tensor


def draw(logits: Tensor, admissions: list[Admission], masks: Mapping[int, Mask] | None = None) -> Drawn:
    """Every row in a place of its own, in reverse order."""
    rows, vocab = logits.shape
    places = torch.arange(rows, dtype=torch.int32).flip(0)
    kept = {
        "records": torch.zeros(rows, RECORD_WORDS, dtype=torch.int32),
        "history": torch.full((rows, vocab), 99, dtype=torch.int16),
        "bias_ids": torch.zeros(rows, MAX_BIASES, dtype=torch.int32),
        "bias_values": torch.zeros(rows, MAX_BIASES),
        "last_tokens": torch.full((rows, 1), -7, dtype=torch.int32),
    }
    for place, admission in zip(places.tolist(), admissions):
        for name, row in place_rows(admission, vocab).items():
            kept[name][place, : len(row)] = torch.from_numpy(row)
    masks = masks or {}
    numbers = {seq_id: i for i, seq_id in enumerate(masks)}
    words = np.stack([*masks.values(), np.zeros(-(-vocab // 32), np.uint32)]).view(np.int32)
    values = {
        "logits": logits, "slots": places, "records": kept["records"], "history": kept["history"],
        "positions": torch.tensor([len(a.prompt) + len(a.output) for a in admissions], dtype=torch.int32),
        "bias_ids": kept["bias_ids"], "bias_values": kept["bias_values"], "masks": torch.from_numpy(words),
        "mask_rows": torch.tensor([numbers.get(a.seq_id, -1) for a in admissions], dtype=torch.int32),
        "last": kept["last_tokens"][:, 0], "out": torch.full((rows,), -9, dtype=torch.int32),
    }  # fmt: skip
    reports, out, last, history = run(
        sample.KERNEL, "llmopt.sample", values, [((rows, REPORT_WORDS), torch.int32)],
        in_place=("out", "last", "history"),
    )  # fmt: skip
    found = []
    for admission, token, report in zip(admissions, out.tolist(), reports.numpy()):
        asked = admission.sampling.logprobs
        found.append(Sampled(token) if asked is None else reported(token, report, asked, vocab))
    return Drawn(found, last.flip(0), history.flip(0))


def host(logits: Tensor, admissions: list[Admission], masks: Mapping[int, Mask] | None = None) -> list[Sampled]:
    sampler = HostSampler(logits.shape[-1])
    for admission in admissions:
        sampler.admit(admission)
    return sampler.sample_rows([a.seq_id for a in admissions], logits.float().numpy(), masks)


def admit(params: list[SamplingParams], start: int = 5) -> list[Admission]:
    """Admissions with prompts of growing length, so that positions differ."""
    return [Admission(i, np.zeros(start + i, np.int64), p) for i, p in enumerate(params)]


def random_logits(rows: int, seed: int, rounded: bool = False, scale: float = 2.0) -> Tensor:
    logits = torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * scale
    return logits.to(torch.bfloat16) if rounded else logits


def tokens(sampled: list[Sampled]) -> list[int]:
    return [s.token for s in sampled]


def test_the_record_is_the_kernels() -> None:
    names = {"inverse_temperature": "INVERSE"}
    found = {name: getattr(_edit, names.get(name, name.upper())).value for name in SAMPLING_RECORD}
    assert found == {name: word for name, (word, _) in SAMPLING_RECORD.items()}
    assert _edit.RECORD.value == RECORD_WORDS


PARAMS = {
    "plain": OFF,
    "hot": replace(OFF, temperature=3.0),
    "greedy": replace(OFF, temperature=0.0),
    "one": replace(OFF, top_k=1),
    "top_k": replace(OFF, top_k=17),
    "many": replace(OFF, top_k=4500, temperature=2.0),
    "all": replace(OFF, top_k=V),
    "top_p": replace(OFF, top_p=0.6),
    "tiny_p": replace(OFF, top_p=1e-6),
    "flat_p": replace(OFF, top_p=0.97, temperature=40.0),
    "both": replace(OFF, top_k=40, top_p=0.8, temperature=1.7),
    "min_p": replace(OFF, min_p=0.2, temperature=2.0),
    "two": replace(OFF, top_p=0.9, min_p=0.02, temperature=1.5),
    "everything": replace(OFF, top_k=60, top_p=0.9, min_p=0.05, temperature=0.8),
}


@pytest.mark.parametrize("rounded", [False, True])
def test_draws_are_the_hosts(rounded: bool) -> None:
    """Rounding to bfloat16 makes many ties, which the lowest ids must win."""
    params = [replace(p, seed=i * 2**60 + 12345) for i, p in enumerate(PARAMS.values())]
    logits, admissions = random_logits(len(params), 1, rounded), admit(params)
    found, expected = draw(logits, admissions), tokens(host(logits, admissions))
    assert tokens(found.sampled) == expected == found.last.tolist()


def test_a_vocabulary_of_many_stretches() -> None:
    """Steep rows draw from a list that ten programs fill, the flat one from the whole row."""
    params = [PARAMS[name] for name in ("top_k", "top_p", "two", "flat_p")]
    logits = torch.randn(len(params), 20000, generator=torch.Generator().manual_seed(8)) * 3
    admissions = admit(params)
    assert tokens(draw(logits, admissions).sampled) == tokens(host(logits, admissions))


def test_another_seed_or_position_draws_another_token() -> None:
    logits, admissions = random_logits(4, 2), admit([OFF] * 4)
    expected = tokens(host(logits, admissions))
    assert tokens(draw(logits, admissions).sampled) == expected
    assert tokens(draw(logits, admit([replace(OFF, seed=12)] * 4)).sampled) != expected
    assert tokens(draw(logits, admit([OFF] * 4, start=6)).sampled) != expected


def test_equal_logits() -> None:
    params = [
        replace(OFF, top_k=7), replace(OFF, top_p=0.31), replace(OFF, top_k=9, top_p=0.5),
        replace(OFF, temperature=0.0), replace(OFF, top_k=9, min_p=1.0),
    ]  # fmt: skip
    logits, admissions = torch.zeros(len(params), V), admit(params)
    assert tokens(draw(logits, admissions).sampled) == tokens(host(logits, admissions))


def test_uniforms_reach_every_part() -> None:
    """The draw follows the host's for many positions of one flat distribution: the generator is the same one."""
    rows = 24
    admissions = admit([replace(OFF, seed=2**63 + 17)] * rows, start=1)
    found = tokens(draw(torch.zeros(rows, V), admissions).sampled)
    assert found == [int(u * V) for u in uniforms([2**63 + 17] * rows, list(range(1, rows + 1)))]


def test_rows_that_cannot_be_drawn() -> None:
    logits = torch.randn(4, V)
    logits[0, 5], logits[1, 7] = float("nan"), float("inf")
    logits[2] = float("-inf")
    admissions = admit([OFF] * 4)
    masks = {3: np.zeros(WORDS, np.uint32)}
    found = draw(logits, admissions, masks)
    assert tokens(found.sampled) == [-1, -1, -1, NO_TOKEN]
    assert found.last.tolist() == [-7] * 4
    for i in range(3):
        with pytest.raises(ExecutorError):
            host(logits[i : i + 1], admissions[i : i + 1])
    assert tokens(host(logits[3:], admissions[3:], masks)) == [NO_TOKEN]


def test_rows_without_a_place_are_left_alone() -> None:
    logits = torch.full((2, V), float("nan"))
    values: dict[str, Any] = {
        "logits": logits, "slots": torch.full((2,), -1, dtype=torch.int32),
        "records": torch.zeros(1, RECORD_WORDS, dtype=torch.int32), "history": torch.ones(1, V, dtype=torch.int16),
        "positions": torch.zeros(2, dtype=torch.int32), "bias_ids": torch.zeros(1, MAX_BIASES, dtype=torch.int32),
        "bias_values": torch.zeros(1, MAX_BIASES), "masks": torch.zeros(1, WORDS, dtype=torch.int32),
        "mask_rows": torch.full((2,), -1, dtype=torch.int32), "last": torch.full((1,), 3, dtype=torch.int32),
        "out": torch.full((2,), -9, dtype=torch.int32),
    }  # fmt: skip
    reports = [((2, REPORT_WORDS), torch.int32)]
    _, out, last, history = run(sample.KERNEL, "llmopt.sample", values, reports, in_place=("out", "last", "history"))
    assert out.tolist() == [-1, -1]
    assert last.tolist() == [3]
    assert (history == 1).all()


def edited() -> tuple[Tensor, list[Admission], dict[int, Mask]]:
    """Rows with penalties, biases, masks and reports, in every mixture."""
    random = np.random.default_rng(0)
    heavy = replace(OFF, temperature=0.7, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2)
    bias = {int(i): float(b) for i, b in zip(random.permutation(V)[:300], random.normal(size=300) * 4)}
    params = [
        heavy, replace(heavy, temperature=0.0, logit_bias=bias), replace(OFF, logit_bias={3: 2.5, V - 1: 9.0}),
        replace(OFF, temperature=0.0, logprobs=3), replace(heavy, top_k=5, logprobs=20, logit_bias={7: -100.0}),
        replace(OFF, temperature=0.0), replace(OFF, top_p=0.7, logprobs=0), replace(OFF, temperature=0.0, logprobs=0),
    ]  # fmt: skip
    logits = random_logits(len(params), 3, rounded=True)
    favorites = logits.float().topk(30).indices.numpy()
    admissions = []
    for i, p in enumerate(params):
        prompt, output = random.choice(favorites[i], 9), random.choice(favorites[i], 25)
        admissions.append(Admission(i, prompt, p, output=output))
    masks = {}
    for i in (1, 2, 4, 5):
        allowed = random.integers(0, 2, WORDS * 32).astype(bool)
        allowed[favorites[i][0]] = False
        masks[i] = np.packbits(allowed, bitorder="little").view(np.uint32)
    return logits, admissions, masks


def test_penalties_biases_masks_and_reports() -> None:
    logits, admissions, masks = edited()
    found, expected = draw(logits, admissions, masks), host(logits, admissions, masks)
    assert tokens(found.sampled) == tokens(expected)
    for ours, theirs in zip(found.sampled, expected):
        assert [i for i, _ in ours.top] == [i for i, _ in theirs.top]
        assert (ours.logprob is None) == (theirs.logprob is None)
        if ours.logprob is not None:
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
            assert [p for _, p in ours.top] == pytest.approx([p for _, p in theirs.top], abs=1e-5)


@pytest.mark.parametrize("without", ["penalties", "biases", "masks"])
def test_every_edit_matters(without: str) -> None:
    """The test above sees a device that forgets an edit."""
    logits, admissions, masks = edited()
    expected = tokens(host(logits, admissions, masks))
    plain = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    change: dict[str, Any] = {"penalties": plain, "biases": {"logit_bias": {}}, "masks": {}}[without]
    poorer = [replace(a, sampling=replace(a.sampling, **change)) for a in admissions]
    assert tokens(draw(logits, poorer, {} if without == "masks" else masks).sampled) != expected


def test_drawn_tokens_are_counted() -> None:
    params = replace(OFF, temperature=0.0, frequency_penalty=0.1)
    logits = random_logits(3, 5)
    best = [int(row.argmax()) for row in logits]
    admissions = [
        Admission(0, np.array([best[0], 1]), params, output=np.array([2, 2])),
        Admission(1, np.array([1]), params, output=np.full(20000, 4)),
        Admission(2, np.array([1]), OFF),
    ]
    found = draw(logits, admissions)
    assert found.history[0, [best[0], 1, 2]].tolist() == [3, 1, 4]
    assert found.history[1, [best[1], 4]].tolist() == [2, 32764]
    assert (found.history[2] == 99).all(), "a sequence without penalties keeps no counts"


def test_counts_stay_at_their_most() -> None:
    params = replace(OFF, temperature=0.0, frequency_penalty=1e-6)
    logits = torch.zeros(1, V)
    logits[0, 4] = 9.0
    found = draw(logits, [Admission(0, np.array([4]), params, output=np.full(40000, 4))])
    assert found.history[0, 4] == 32767
    assert found.sampled[0].token == 4
