"""Sampling on the device against the host sampler: the same tokens for the same logits, seeds and positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmopt.runtime.philox import uniforms
from llmopt.runtime.protocol import Admission, SamplingParams
from llmopt.runtime.sampler import HostSampler
from targets.cuda.kernels import sample
from tests.targets.cuda.kernels.harness import run

V = 300
OFF = SamplingParams(temperature=1.0)


def draw(logits: Tensor, params: list[SamplingParams], seeds: list[int], positions: list[int]) -> Tensor:
    """Tokens of the kernel, every row in its own slot."""
    rows = len(params)
    words = np.array(seeds, np.uint64).view(np.int32).reshape(rows, 2)
    values = {
        "logits": logits, "slots": torch.arange(rows, dtype=torch.int32),
        "temperature": torch.tensor([p.temperature for p in params]),
        "top_k": torch.tensor([p.top_k for p in params], dtype=torch.int32),
        "top_p": torch.tensor([p.top_p for p in params], dtype=torch.float64),
        "min_p": torch.tensor([p.min_p for p in params]),
        "seeds": torch.from_numpy(words.copy()), "positions": torch.tensor(positions),
        "last": torch.full((rows,), -7, dtype=torch.int32),
    }  # fmt: skip
    out, last = run(sample.KERNEL, "llmopt.sample", values, [((rows,), torch.int32)], in_place=("last",))
    assert torch.equal(torch.where(out >= 0, out, -7), last)
    return out


def host(logits: Tensor, params: list[SamplingParams], seeds: list[int], positions: list[int]) -> list[int]:
    sampler = HostSampler(logits.shape[-1])
    for i, (p, seed, position) in enumerate(zip(params, seeds, positions)):
        sampler.admit(Admission(i, np.zeros(position, np.int64), replace(p, seed=seed)))
    found = sampler.sample_rows(list(range(len(params))), logits.float().numpy())
    return [s.token for s in found]


PARAMS = {
    "plain": OFF,
    "hot": replace(OFF, temperature=3.0),
    "greedy": replace(OFF, temperature=0.0),
    "one": replace(OFF, top_k=1),
    "top_k": replace(OFF, top_k=17),
    "all": replace(OFF, top_k=V),
    "top_p": replace(OFF, top_p=0.6),
    "tiny_p": replace(OFF, top_p=1e-6),
    "both": replace(OFF, top_k=40, top_p=0.8, temperature=1.7),
    "min_p": replace(OFF, min_p=0.2, temperature=2.0),
    "everything": replace(OFF, top_k=60, top_p=0.9, min_p=0.05, temperature=0.8),
}


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("rounded", [False, True])
def test_draws_are_the_hosts(name: str, rounded: bool) -> None:
    """Rounding to bfloat16 makes many ties, which the lowest ids must win."""
    rows = 6
    logits = torch.randn(rows, V, generator=torch.Generator().manual_seed(len(name))) * 2
    logits = logits.to(torch.bfloat16) if rounded else logits
    params, seeds, positions = (
        [PARAMS[name]] * rows,
        [i * 2**61 + 12345 for i in range(rows)],
        [5 + i for i in range(rows)],
    )
    assert draw(logits, params, seeds, positions).tolist() == host(logits, params, seeds, positions)


def test_equal_logits() -> None:
    logits = torch.zeros(4, V)
    params = [
        replace(OFF, top_k=7),
        replace(OFF, top_p=0.31),
        replace(OFF, top_k=9, top_p=0.5),
        replace(OFF, temperature=0),
    ]
    seeds, positions = [3, 4, 5, 6], [1, 2, 3, 4]
    assert draw(logits, params, seeds, positions).tolist() == host(logits, params, seeds, positions)


def test_uniforms_reach_every_part() -> None:
    """The draw follows the host's for many positions of one flat distribution: the generator is the same one."""
    rows = 24
    logits, params = torch.zeros(rows, V), [OFF] * rows
    seeds, positions = [2**63 + 17] * rows, list(range(1, rows + 1))
    found = draw(logits, params, seeds, positions).tolist()
    assert found == [int(u * V) for u in uniforms(seeds, positions)]


def test_rows_that_cannot_be_drawn() -> None:
    logits = torch.randn(3, V)
    logits[0, 5], logits[1, 7] = float("nan"), float("inf")
    logits[2] = float("-inf")
    assert draw(logits, [OFF] * 3, [1] * 3, [1] * 3).tolist() == [-1, -1, -1]


def edit(logits: Tensor, **more: Any) -> Tensor:
    rows = len(logits)
    values: dict[str, Any] = {"logits": logits, "slots": torch.arange(rows, dtype=torch.int32), "mask": None}
    values |= dict.fromkeys(("history", "repetition", "presence", "frequency", "bias_ids", "bias_values"))
    (out,) = run(sample.KERNEL, "llmopt.edit_logits", {**values, **more}, [((rows, V), torch.float32)])
    return out


def test_penalties_bias_and_mask() -> None:
    random = np.random.default_rng(0)
    logits = torch.randn(2, V, generator=torch.Generator().manual_seed(3)) * 3
    prompts, outputs = [random.integers(0, V, 9) for _ in range(2)], [random.integers(0, V, 12) for _ in range(2)]
    history = torch.zeros(2, V, dtype=torch.int32)
    for row, (prompt, output) in enumerate(zip(prompts, outputs)):
        history[row, torch.from_numpy(prompt)] = 1
        history[row] += 2 * torch.bincount(torch.from_numpy(output), minlength=V).to(torch.int32)
    allowed = random.integers(0, 2, (2, V)).astype(bool)
    allowed[:, :4] = True
    bits = np.zeros((2, -(-V // 32) * 32), bool)
    bits[:, :V] = allowed
    words = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    bias: list[Mapping[int, float]] = [{3: 2.5, 299: -4.0}, {0: 1.0}]
    p = SamplingParams(temperature=0.7, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2)
    one = torch.ones(2)
    found = edit(
        logits, history=history, repetition=one * 1.3, presence=one * 0.4, frequency=one * 0.2,
        mask=torch.from_numpy(words.copy()), bias_ids=torch.tensor([[3, 299], [0, -1]], dtype=torch.int32),
        bias_values=torch.tensor([[2.5, -4.0], [1.0, 0.0]]),
    )  # fmt: skip
    sampler = HostSampler(V)
    for i in range(2):
        sampler.admit(Admission(i, prompts[i], replace(p, logit_bias=bias[i], seed=9), output=outputs[i]))
    masks = {i: words[i].view(np.uint32) for i in range(2)}
    expected = [s.token for s in sampler.sample_rows([0, 1], logits.numpy(), masks)]
    positions = [len(a) + len(b) for a, b in zip(prompts, outputs)]
    assert draw(found, [p] * 2, [9] * 2, positions).tolist() == expected
    assert torch.equal(found == -torch.inf, torch.from_numpy(~allowed))
    untouched = (history == 0) & torch.from_numpy(allowed)
    untouched[0, [3, 299]] = untouched[1, 0] = False
    assert torch.equal(found[untouched], logits[untouched])


def test_drawn_tokens_are_counted() -> None:
    history = torch.zeros(3, V, dtype=torch.int32)
    history[1, 4] = 3
    values = {
        "tokens": torch.tensor([4, -1, 9], dtype=torch.int32),
        "slots": torch.tensor([1, 2, -1], dtype=torch.int32),
    }
    (found,) = run(sample.KERNEL, "llmopt.record_token", {**values, "history": history}, in_place=("history",))
    expected = history.clone()
    expected[1, 4] += 2
    assert torch.equal(found, expected)
