"""What quantizing costs a trained model: recipes side by side on held-out text, compared by paired block bootstrap.

python benchmarks/quality.py CHECKPOINT --train TEXT --held-out TEXT [--windows 64] [--tokens 16384] [--only NAME]
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from llmopt.calibration.text import read_text, read_windows
from llmopt.frontend import capture, load_checkpoint
from llmopt.ir.folding import EXPERTS, LINEAR, find_folding
from llmopt.ir.module import Module
from llmopt.ir.pass_manager import PassContext, PassManager
from llmopt.ir.samples import Calibration
from llmopt.ir.weights import Scaled
from llmopt.recipe import build_pass
from llmopt.registry import load_target
from llmopt.report.accuracy import Interval, block_bootstrap, mean, paired_bootstrap
from llmopt.report.evaluate import Scores, split_windows
from llmopt.report.proof import logits_of

WINDOW = 512
FUSIONS = ("eliminate_noops", "fuse_qkv", "fuse_gate_up", "fuse_gated_activation", "fuse_add_norm")
G128 = {"bits": 4, "group_size": 128}
ZEROS = {**G128, "symmetric": False}
W8A8: list[tuple[str, dict[str, Any]]] = [("quantize_weights", {"bits": 8}), ("quantize_activations", {})]
PLANTED = "outliers, "
"""Schemes whose model has activations OUTLIER times larger in every STRIDE-th channel, the function unchanged."""
OUTLIER, STRIDE = 100.0, 29
STARVED = "small scales, "
"""Schemes whose scales of keys and values are made SHRINK times smaller, so that most of them saturate."""
SHRINK = 64.0
SCHEMES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "int8 a channel": [("quantize_weights", {"bits": 8})],
    "int4 g128": [("quantize_weights", G128)],
    "int4 g128 GPTQ": [("gptq", G128)],
    "int4 g128 AWQ": [("awq", G128), ("quantize_weights", G128)],
    "int4 g128 AWQ scales, GPTQ": [("awq", {**G128, "clip": False}), ("gptq", G128)],
    "int4 g128 zeros": [("quantize_weights", ZEROS)],
    "int4 g128 zeros GPTQ": [("gptq", ZEROS)],
    "int4 g128 zeros AWQ": [("awq", ZEROS), ("quantize_weights", ZEROS)],
    "fp8 a channel": [("quantize_weights", {"format": "fp8_e4m3"})],
    "fp8 128×128": [("quantize_weights", {"format": "fp8_e4m3", "scales": "blocks"})],
    "fp8 W8A8": [("quantize_weights", {"format": "fp8_e4m3"}), ("quantize_activations", {"format": "fp8_e4m3"})],
    "int8 W8A8": W8A8,
    "outliers, int8 W8A8": W8A8,
    "outliers, int8 W8A8 SmoothQuant": [("smoothquant", {}), *W8A8],
    "KV int8": [("quantize_kv", {"format": "int8"})],
    "KV fp8": [("quantize_kv", {"format": "fp8_e4m3"})],
    "KV int8, unit scales": [("quantize_kv", {"format": "int8", "scales": "unit"})],
    "KV fp8, unit scales": [("quantize_kv", {"format": "fp8_e4m3", "scales": "unit"})],
    "small scales, KV int8": [("quantize_kv", {"format": "int8"})],
    "small scales, KV fp8": [("quantize_kv", {"format": "fp8_e4m3"})],
    "int4 g32": [("quantize_weights", {"bits": 4, "group_size": 32})],
    "int4 g32 GPTQ": [("gptq", {"bits": 4, "group_size": 32})],
}


@dataclass(frozen=True)
class Bench:
    """A checkpoint, its calibration windows, and the held-out windows (n, WINDOW + 1) with fp32's logits."""

    checkpoint: Path
    calibration: Tensor
    windows: npt.NDArray[np.int64]

    def module(self) -> Module:
        """The captured model, fused, in fp32."""
        module = capture(load_checkpoint(self.checkpoint), torch.float32, WINDOW).module
        self.run(module, [(name, {}) for name in FUSIONS])
        return module

    def run(self, module: Module, passes: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Run passes, calibrated; those that can, on experts too."""
        context = PassContext(load_target("reference").info, torch.float32, Calibration(self.calibration))
        found = [build_pass(name, options) for name, options in passes]
        if any(module.functions["step"].graph.find_nodes(op="call_function", target=EXPERTS)):
            found = [replace(pass_, experts=True) if hasattr(pass_, "experts") else pass_ for pass_ in found]
        PassManager().run(module, found, context)

    def score(self, module: Module, exact: Sequence[npt.NDArray[np.float32]]) -> Scores:
        """Losses, KL and agreement of a module."""
        scores = Scores()
        for window, baseline in zip(self.windows, exact):
            scores.add(window, [(logits_of(module, torch.from_numpy(window[None, :-1]))[0].numpy(), baseline)])
        return scores


def plant(module: Module) -> None:
    """Scale channels of every input that can be scaled exactly."""
    function = module.functions["step"]
    linears = function.graph.find_nodes(op="call_function", target=LINEAR)
    for source in dict.fromkeys(node.args[0] for node in linears):
        if (folding := find_folding(source)) is not None:
            factor = torch.ones(int(source.meta["val"].shape[-1]))
            factor[3::STRIDE] = OUTLIER
            folding.apply(module, function, folding.tie(factor))


def starve(module: Module) -> None:
    """Make the scales of keys and values too small."""
    for name, weight in module.weights.items():
        if name.endswith((".k_scale", ".v_scale")):
            module.weights[name] = Scaled(weight, 0, torch.full(weight.shape, 1 / SHRINK))


def difference(a: Scores, b: Scores) -> Interval:
    """Mean KL of ``a`` less that of ``b``, paired."""
    return block_bootstrap(np.stack(a.kl) - np.stack(b.kl), mean)


def rows(bench: Bench, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row a scheme; ``against_rtn`` compares with round-to-nearest of the same format."""
    plain = bench.module()
    exact = [found.numpy() for found in logits_of(plain, torch.from_numpy(bench.windows[:, :-1]))]
    scored: dict[str, Scores] = {}
    made = []
    for name in names:
        module = bench.module()
        if name.startswith(PLANTED):
            plant(module)
        bench.run(module, SCHEMES[name])
        if name.startswith(STARVED):
            starve(module)
        scores = scored[name] = bench.score(module, exact)
        nll, base = np.stack(scores.nll), np.stack(scores.baseline_nll)
        row = {"scheme": name, "change": paired_bootstrap(nll, base).to_json()}
        row["kl_mean"] = block_bootstrap(np.stack(scores.kl), mean).to_json()
        row["top1_agreement"] = float(np.stack(scores.agree).mean())
        rtn = max((n for n in scored if n != name and name.startswith(n)), key=len, default=name)
        if rtn != name and SCHEMES[rtn][-1][1] == SCHEMES[name][-1][1]:
            row["against_rtn"] = {
                "perplexity": paired_bootstrap(nll, np.stack(scored[rtn].nll)).to_json(),
                "kl_mean": difference(scores, scored[rtn]).to_json(),
            }
        made.append(row)
        print(json.dumps(row), flush=True)
    return made


def main() -> None:
    """Measure and print rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--only", action="append", choices=list(SCHEMES))
    parser.add_argument("--append", type=Path)
    given = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(given.checkpoint / "tokenizer.json"))
    ids = np.array(tokenizer.encode(read_text(given.held_out), add_special_tokens=False).ids, np.int64)
    windows = split_windows(ids, WINDOW, given.windows * WINDOW).copy()
    calibration = read_windows(given.train, tokenizer, given.tokens, WINDOW).calibration
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    common = {"date": date.today().isoformat(), "commit": head.stdout.strip(), "model": given.checkpoint.name}
    common |= {"windows": len(windows), "window": WINDOW, "calibration_tokens": calibration.numel()}
    made = [common | row for row in rows(Bench(given.checkpoint, calibration, windows), given.only or list(SCHEMES))]
    if given.append:
        with given.append.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in made)


if __name__ == "__main__":
    main()
