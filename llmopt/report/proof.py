"""What a quantizing build lost, measured on held-out windows: run by the IR's reference semantics, weight by weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from llmopt.ir.feed import limit_chunk, run_sequences
from llmopt.ir.interpret import JointObserver
from llmopt.ir.module import Module
from llmopt.ir.ops.moe import moe_experts
from llmopt.ir.rewrite import arguments
from llmopt.ir.samples import CPU
from llmopt.ir.sites import CODES, EMBEDDING_Q, LINEAR_Q, quantized_names, restored, unrounded
from llmopt.report.accuracy import kl_divergence
from llmopt.report.evaluate import Scores, summarize

Progress = Callable[[str, int, int], None]
MOST_WINDOWS, LOGITS_BYTES = 8, 1 << 30
"""Windows that run side by side at most, and bytes of their logits, of which there are two sets."""


def prove(
    baseline: Module, built: Module, held_out: Tensor, progress: Progress, device: torch.device = CPU
) -> dict[str, Any]:
    """Scores of ``built`` beside ``baseline`` on windows (m, length + 1), and each quantized call's output error, both
    computed on ``device``."""
    scores, errors, done = Scores(), OutputErrors(built), 0
    for windows in groups(built, held_out):
        found = logits_of(built, windows[:, :-1], errors.observe, device)
        exact = logits_of(baseline, windows[:, :-1], None, device)
        for window, a, b in zip(windows, found, exact):
            scores.add(window.numpy(), [(a.numpy(), b.numpy())])
        done += len(windows)
        progress("proof", done, len(held_out))
    result = summarize(scores)
    return result | {"window": held_out.shape[1] - 1, "layers": errors.layers()}


def sensitivity(built: Module, held_out: Tensor, progress: Progress, device: torch.device = CPU) -> dict[str, float]:
    """Mean KL, by the name of a quantized weight (of experts: the first), of a model in which it alone is quantized.

    The others, and the reference it is compared with, are as the quantizer found them. One run of the model a weight
    and some windows.
    """
    names = list(dict.fromkeys(name for name, _ in quantized_calls(built)))

    def run(module: Module) -> list[Tensor]:
        return [row for some in groups(built, held_out) for row in logits_of(module, some[:, :-1], None, device)]

    exact = run(restored(built, keep=()))
    found = {}
    for index, name in enumerate(names):
        rows = [kl_divergence(a.numpy(), b.numpy()) for a, b in zip(exact, run(restored(built, keep=(name,))))]
        found[name] = float(np.concatenate(rows).mean())
        progress("sensitivity", index + 1, len(names))
    return found


def groups(module: Module, windows: Tensor) -> tuple[Tensor, ...]:
    """The windows (m, length) in groups that run side by side: each reads the weights once."""
    logits = 4 * windows.shape[1] * module.config.vocab_size
    return tuple(torch.split(windows, max(1, min(MOST_WINDOWS, LOGITS_BYTES // logits))))


def logits_of(
    module: Module, windows: Tensor, observe: JointObserver | None = None, device: torch.device = CPU
) -> list[Tensor]:
    """fp32 logits (T, V) of windows (m, T) by the function that runs prefill, side by side, on the CPU in the end."""
    name, length = "step" if "step" in module.functions else "extend", windows.shape[1]
    chunk = limit_chunk(module, length)
    chunks = [min(chunk, length - start) for start in range(0, length, chunk)]
    return [found.float().cpu() for found in run_sequences(module, name, windows.tolist(), chunks, observe, device)]


def quantized_calls(module: Module) -> Iterable[tuple[str, fx.Node]]:
    """Name of the (first) weight and call of quantized calls whose original weights are known, in program order."""
    function = module.functions["step" if "step" in module.functions else "extend"]
    for node in function.graph.nodes:
        if node.target in CODES and set(names := quantized_names(node)) <= module.originals.keys():
            yield names[0], node


def read_by(call: fx.Node) -> set[fx.Node]:
    """The values, weights apart, that a quantized call's exact result is computed of."""
    given = arguments(call)
    read = (unrounded(given[0]), *given[1:4])
    return {value for value in read if isinstance(value, fx.Node) and value.op != "get_attr"}


class OutputErrors:
    """Squared output error of quantized calls, relative to the output of the weights they were made of.

    Inputs are kept up to the last call that reads them."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.names = {node: name for name, node in quantized_calls(module)}
        self.last = {source: node for node in self.names for source in read_by(node)}
        self.inputs: dict[fx.Node, list[Tensor]] = {}
        self.sums = {name: [0.0, 0.0] for name in self.names.values()}

    @torch.no_grad()
    def observe(self, node: fx.Node, values: list[Any]) -> None:
        """Sees every value of some windows' runs."""
        if node in self.last:
            self.inputs[node] = values
        if (name := self.names.get(node)) is None:
            return
        made = values
        if node.target == EMBEDDING_Q:
            exact = self._embeddings(node, name)
        elif node.target == LINEAR_Q:
            made, exact = self._linears(node, values)
        else:
            exact = self._experts(node)
        for a, b in zip(made, exact, strict=True):
            self.sums[name][0] += float((a - b).double().pow(2).sum())
            self.sums[name][1] += float(b.double().pow(2).sum())
        for source in read_by(node):
            if self.last[source] is node:
                del self.inputs[source]

    def _embeddings(self, node: fx.Node, name: str) -> list[Tensor]:
        """Rows of the original table."""
        ids = self.inputs[arguments(node)[3]]
        table = self.module.originals[name].tensor(ids[0].device)
        return [F.embedding(some, table) for some in ids]

    def _linears(self, node: fx.Node, values: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """A linear's results and those of its original weight, both without the bias."""
        given, (name,) = arguments(node), quantized_names(node)
        device = values[0].device
        weight = self.module.originals[name].tensor(device)
        exact = [F.linear(x, weight) for x in self.inputs[unrounded(given[0])]]
        if given[4] is None:
            return values, exact
        bias = self.module.weights[str(given[4].target)].tensor(device)
        return [value - bias for value in values], exact

    def _experts(self, node: fx.Node) -> list[Tensor]:
        """The results of the experts' original weights."""
        given = arguments(node)
        routed = [self.inputs[source] for source in (unrounded(given[0]), given[1], given[2])]
        device = routed[0][0].device
        weights = [self.module.originals[name].tensor(device) for name in quantized_names(node)]
        biases = [None if b is None else self.module.weights[str(b.target)].tensor(device) for b in given[9:11]]
        return [moe_experts(*some, *weights, *biases, given[11]) for some in zip(*routed, strict=True)]

    def layers(self) -> list[dict[str, Any]]:
        """Name and relative squared output error of each weight, in program order."""
        return [{"name": name, "output_error": a / b if b else 0.0} for name, (a, b) in self.sums.items()]


def key_figures(result: dict[str, Any]) -> dict[str, Any]:
    """What the manifest keeps: the figures without positions, tokens and layers."""
    base = {k: v for k, v in result["baseline"].items() if k not in ("positions", "worst")}
    return {k: v for k, v in result.items() if k not in ("baseline", "layers")} | {"baseline": base}


def rounded(value: Any) -> Any:
    """Numbers to six significant digits: what a machine's order of summation does not change."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value
