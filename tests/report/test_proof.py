"""The proof of a quantizing build: figures against simulation, layer errors, sensitivity, the page."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llmopt.ir.module import Module
from llmopt.ir.sites import restored
from llmopt.ir.weights import Constant
from llmopt.report.accuracy import block_bootstrap, mean, p99
from llmopt.report.page import accuracy_page
from llmopt.report.proof import key_figures, logits_of, prove, rounded, sensitivity
from tests.calibration.running import mlp, windows
from tests.passes.running import run

TOKENS = windows(5, 33, seed=7)
NAMES = ["layers.0.down_proj.weight", "layers.0.gate_proj.weight", "layers.0.up_proj.weight"]


def quantized(**options: Any) -> Module:
    module = mlp(layers=1)
    run(module, ("quantize_weights", {"bits": 3, "group_size": 32, **options}))
    return module


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return prove(mlp(layers=1), quantized(), TOKENS, lambda *_: None)


def test_figures_equal_those_computed_at_once(result: dict[str, Any]) -> None:
    exact, made = mlp(layers=1), quantized()
    p, q = (torch.stack(logits_of(m, TOKENS[:, :-1])).double().log_softmax(-1) for m in (exact, made))
    kl = (p.exp() * (p - q)).sum(-1)
    targets = TOKENS[:, 1:]
    losses = [float(F.nll_loss(x.flatten(0, 1), targets.flatten())) for x in (q, p)]
    base = result["baseline"]
    assert result["perplexity"] == pytest.approx(np.exp(losses[0]))
    assert base["perplexity"] == pytest.approx(np.exp(losses[1]))
    assert base["kl_mean"] == pytest.approx(float(kl.mean()))
    assert base["kl_p99"] == pytest.approx(float(kl.quantile(0.99)), rel=1e-6)
    assert base["top1_agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    for name in ("kl_mean", "kl_p99", "top1_agreement"):
        low, high = base["intervals"][name]
        assert low <= base[name] <= high
    assert base["positions"][0]["kl"] == pytest.approx(float(kl[:, :1].mean()))
    worst = base["worst"][0]
    assert worst["kl"] == pytest.approx(float(kl.max()))
    assert worst["token"] == int(targets[worst["window"], worst["position"]])
    assert worst["context"][-1] == int(TOKENS[worst["window"], worst["position"]])


def test_an_unquantized_build_lost_nothing() -> None:
    found = prove(mlp(layers=1), mlp(layers=1), TOKENS, lambda *_: None)
    assert found["baseline"]["kl_mean"] < 1e-9
    assert found["baseline"]["top1_agreement"] == 1.0
    assert found["layers"] == []


def test_output_errors_equal_their_definition(result: dict[str, Any]) -> None:
    module, exact = quantized(), mlp(layers=1)
    seen: dict[str, torch.Tensor] = {}
    sums = [0.0, 0.0]
    for window in TOKENS:
        logits_of(module, window[None, :-1], lambda node, values: seen.__setitem__(node.name, values[0]))
        x = seen["rms_norm_default"]
        y = F.linear(x, exact.weights["layers.0.up_proj.weight"].tensor())
        made = module.functions["step"].graph.find_nodes(op="call_function", target=torch.ops.llmopt.linear_q.default)[
            1
        ]
        sums[0] += float((seen[made.name] - y).pow(2).sum())
        sums[1] += float(y.pow(2).sum())
    layers = {layer["name"]: layer["output_error"] for layer in result["layers"]}
    assert sorted(layers) == NAMES
    assert layers["layers.0.up_proj.weight"] == pytest.approx(sums[0] / sums[1], rel=1e-5)


def test_sensitivity_quantizes_one_layer_alone() -> None:
    made = quantized()
    found = sensitivity(made, TOKENS, lambda *_: None)
    assert sorted(found) == NAMES
    alone = mlp(layers=1)
    name = NAMES[0]
    run(alone, ("quantize_weights", {"bits": 3, "group_size": 32, "include": [name]}))
    p, q = (torch.cat(logits_of(m, TOKENS[:, :-1])).double().log_softmax(-1) for m in (mlp(layers=1), alone))
    assert found[name] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-6)
    assert found[name] != pytest.approx(found[NAMES[1]], rel=1e-3)


def test_restored_weights_are_what_the_quantizer_found() -> None:
    made, exact = quantized(), mlp(layers=1)

    def logits(module: Module) -> torch.Tensor:
        return logits_of(module, TOKENS[:1])[0]

    assert torch.equal(logits(restored(made, keep=())), logits(exact))
    assert torch.equal(logits(restored(made, keep=NAMES)), logits(made))
    made.originals[NAMES[0]] = Constant(torch.zeros_like(exact.weights[NAMES[0]].tensor()))
    assert not torch.equal(logits(restored(made, keep=())), logits(exact))


def test_block_bootstrap_covers_the_truth_and_respects_blocks() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        values = generator.normal(size=(40, 1)) + 0.01 * generator.normal(size=(40, 50))
        interval = block_bootstrap(values, mean)
        hits += 0.0 in interval
    assert hits >= 50
    loose, tight = block_bootstrap(values, mean), block_bootstrap(values.reshape(-1, 1), mean)
    assert loose.high - loose.low > 3 * (tight.high - tight.low)  # tokens of a window are not independent
    assert block_bootstrap(values, p99).value == pytest.approx(float(np.quantile(values, 0.99)))


def test_the_page_is_self_contained(result: dict[str, Any]) -> None:
    for layer in result["layers"]:
        layer["kl"] = 0.5
    page = accuracy_page(result, "a <b>")
    assert "a &lt;b&gt;" in page
    assert "http" not in page
    for start, piece in enumerate(page.split("<svg")[1:]):
        ET.fromstring("<svg" + piece.split("</svg>")[0] + "</svg>")
        assert start < 4
    assert page.count("<svg") == 4
    assert f"{result['baseline']['kl_mean']:.3e}" in page


def test_the_manifest_keeps_the_key_figures(result: dict[str, Any]) -> None:
    figures = key_figures(rounded(result))
    assert json.loads(json.dumps(figures)) == figures
    assert set(figures["baseline"]) >= {"perplexity", "change", "kl_mean", "kl_p99", "top1_agreement", "intervals"}
    assert "layers" not in figures
    assert rounded(1.23456789) == 1.23457
