"""choose_precision: budgets are kept, the choice beats uniform ones of its size, impossible ones name what binds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmopt.errors import ConfigError, PassError
from llmopt.ir.module import Module
from llmopt.ir.pass_manager import PassManager
from llmopt.ir.samples import Calibration
from llmopt.ir.weights import Constant
from llmopt.recipe import build_pass
from llmopt.report.page import accuracy_page
from llmopt.report.proof import prove
from passes.choose_precision import number_of_bytes
from tests.calibration.running import calibrated, mixture, mlp, windows
from tests.passes.running import context, logits

OPTIONS: dict[str, Any] = {"bits": [2, 3, 4, 6, 8], "group_sizes": [32]}
RTN: tuple[str, dict[str, Any]] = ("quantize_weights", {"bits": 8, "group_size": 32})


def uneven() -> Module:
    """A model with one layer that hardly matters."""
    module = mlp()
    for name in ("layers.1.down_proj.weight", "layers.1.up_proj.weight"):
        module.weights[name] = Constant(module.weights[name].tensor() * 0.05)
    return module


def packed(module: Module) -> float:
    """Bytes of all weights, codes packed."""
    widths = {f"{name}.codes": p.bits for name, p in module.precision.items() if p is not None}
    return sum(w.nbytes * widths.get(name, 8) / 8 for name, w in module.weights.items())


def kl(module: Module) -> float:
    return float(prove(uneven(), module, windows(4, 33, seed=8), lambda *_: None)["baseline"]["kl_mean"])


def test_beats_uniform_choices_of_its_size_or_larger(tmp_path: Path) -> None:
    for bits in (3, 4):
        plain, chosen = uneven(), uneven()
        calibrated(plain, tmp_path, ("quantize_weights", {"bits": bits, "group_size": 32}))
        size = sum(w.nbytes * (bits / 8 if n.endswith(".codes") else 1) for n, w in plain.weights.items())
        calibrated(chosen, tmp_path, ("choose_precision", {**OPTIONS, "size": f"{size / 1e3 + 0.001:.3f}kB"}), RTN)
        assert packed(chosen) <= size + 2
        assert kl(chosen) < kl(plain)


def test_a_kl_budget_takes_the_smallest_model_within_it(tmp_path: Path) -> None:
    sizes = []
    for budget in (0.5, 0.05, 0.005):
        module = uneven()
        calibrated(module, tmp_path, ("choose_precision", {**OPTIONS, "kl": budget}), RTN)
        assert module.notes["choose_precision"]["kl"] <= budget
        sizes.append(packed(module))
        assert module.notes["choose_precision"]["bytes"] == pytest.approx(sizes[-1], abs=2)
    assert sizes[0] < sizes[1] < sizes[2]


def test_time_is_bytes_over_bandwidth(tmp_path: Path) -> None:
    a, b = uneven(), uneven()
    calibrated(a, tmp_path, ("choose_precision", {**OPTIONS, "size": "60kB"}))
    read = 60e3 - 17 * 64 * 4  # all but the embedding's table
    calibrated(b, tmp_path, ("choose_precision", {**OPTIONS, "ms_per_token": read / 1e6, "bandwidth": "1GB/s"}))
    assert a.precision == b.precision


def test_gptq_takes_the_choice_and_weights_left_alone_stay(tmp_path: Path) -> None:
    module = uneven()
    calibrated(module, tmp_path, ("choose_precision", {**OPTIONS, "kl": 1e-7}), ("gptq", {"group_size": 32}))
    kept = [name for name, p in module.precision.items() if p is None]
    assert kept
    assert all(name in module.weights for name in kept)
    module = uneven()
    exact = logits(module)
    calibrated(module, tmp_path, ("choose_precision", {**OPTIONS, "kl": 0.05}), ("gptq", {"group_size": 32}))
    assert {p.bits for p in module.precision.values() if p} > {3} or len(set(module.precision.values())) > 1
    for name, p in module.precision.items():
        assert p is not None
        assert int(module.weights[f"{name}.codes"].tensor().max()) < 2**p.bits
    assert float((logits(module) - exact).abs().max()) > 0


def test_another_budget_measures_nothing_again(tmp_path: Path) -> None:
    def choose(budget: float) -> float:
        module = uneven()
        calibrated(module, tmp_path, ("choose_precision", {**OPTIONS, "kl": budget}))
        return float(module.notes["choose_precision"]["kl"])

    first = choose(0.05)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("loss*.safetensors")}
    assert len(files) == 6
    assert choose(0.5) > first
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("loss*.safetensors")}


def test_every_choice_is_explained(tmp_path: Path) -> None:
    module = uneven()
    calibrated(module, tmp_path, ("choose_precision", {**OPTIONS, "size": "60kB"}))
    notes = module.notes["choose_precision"]
    assert len(notes["layers"]) == 6
    for layer in notes["layers"]:
        assert layer["chosen"] in [o["label"] for o in layer["options"]]
    sizes = [p["bytes"] for p in notes["front"]]
    assert sizes == sorted(sizes)
    assert len(sizes) > 6


def timed(n: int, k: int, dtype: str, bits: int | None, group: int) -> float | None:
    """A target whose 4-bit kernel was measured, and is slower than reading fp32."""
    return 400.0 if (n, bits) == (128, 4) else None


def test_measured_times_count_and_are_told(tmp_path: Path) -> None:
    options = {"bits": [4, 8], "group_sizes": [32], "ms_per_token": 0.054, "bandwidth": "1GB/s"}
    module, slow = uneven(), uneven()
    calibrated(module, tmp_path, ("choose_precision", options))
    context_ = replace(context(), calibration=Calibration(windows(), tmp_path))
    target = replace(context_.target, linear_us=timed)
    PassManager().run(slow, [build_pass("choose_precision", options)], replace(context_, target=target))
    notes = [m.notes["choose_precision"]["layers"] for m in (module, slow)]
    assert {o["time"] for layer in notes[0] for o in layer["options"]} == {"modelled"}
    for layer in notes[1]:
        wide = "down" not in layer["name"]
        for option in layer["options"]:
            measured = wide and option["label"].startswith("4")
            assert option["time"] == ("measured" if measured else "modelled")
            assert (option["ms"] == 0.4) == measured
    up = [p for name, p in slow.precision.items() if "down" not in name]
    assert up
    assert all(p is None or p.bits == 8 for p in up)
    assert any(p is not None and p.bits == 4 for p in module.precision.values())


def test_a_token_reads_the_experts_it_is_routed_to(tmp_path: Path) -> None:
    module, options = mixture(), {"experts": True, "bits": [4, 8], "group_sizes": [32], "kl": 1e-9}
    times = {"ms_per_token": 1e3, "bandwidth": "1MB/s"}
    calibrated(module, tmp_path, ("choose_precision", options | times), tokens=windows(vocab=61))
    (layer,) = module.notes["choose_precision"]["layers"]
    assert layer["name"] == "experts.gate_up, experts.down"
    whole = layer["options"][-1]
    assert whole["bytes"] == 4 * 4 * (192 * 64 + 64 * 96)
    assert whole["ms"] == pytest.approx(whole["bytes"] / 1e3 / 2, rel=1e-3)  # two of four experts


def test_experts_of_a_call_share_a_choice(tmp_path: Path) -> None:
    module = mixture()
    passes = [
        ("choose_precision", {**OPTIONS, "experts": True, "size": "100kB"}),
        ("gptq", {"group_size": 32, "experts": True}),
    ]
    calibrated(module, tmp_path, *passes, tokens=windows(vocab=61))
    assert len(set(module.precision.values())) == 1
    chosen = module.precision["experts.down"]
    assert chosen is not None
    assert 2 ** (chosen.bits - 1) <= int(module.weights["experts.down.codes"].tensor().max()) < 2**chosen.bits


def test_the_page_shows_the_front_and_the_reasons(tmp_path: Path) -> None:
    module = uneven()
    calibrated(module, tmp_path, ("choose_precision", {**OPTIONS, "size": "60kB"}), RTN)
    result = prove(uneven(), module, windows(4, 33, seed=8), lambda *_: None)
    page, plain = accuracy_page(result, "t", None, module.notes), accuracy_page(result, "t")
    assert "Choice of precision" in page
    assert "Choice of precision" not in plain
    assert page.count("<svg") == plain.count("<svg") + 1
    for layer in module.notes["choose_precision"]["layers"]:
        assert f"<td>{layer['name']}</td>" in page
        assert layer["why"] in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "5kB"}, r"the budget size 5kB cannot be met: the smallest choice takes [\d.]+ MB more"),
        ({"size": "1GB", "ms_per_token": 1e-9, "bandwidth": "1GB/s"}, "the budget ms_per_token 1e-09 cannot be met"),
        ({"size": "45kB", "kl": 1e-6}, "the budgets kl 1e-06 and size 45kB exclude each other: within"),
        ({"size": "1GB", "bits": [9]}, "target reference has no 9-bit weights"),
    ],
)
def test_impossible_budgets_name_what_binds(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        calibrated(uneven(), tmp_path, ("choose_precision", {**OPTIONS, **options}))


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "at least one budget"), ({"ms_per_token": 1.0}, "go together"), ({"size": "5 apples"}, "is no size")],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_pass("choose_precision", options)
    assert number_of_bytes("1.5GiB") == 1.5 * 2**30
