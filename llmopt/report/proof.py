"""What a quantizing build lost, measured on held-out windows: run by the IR's reference semantics, weight by weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from llmopt.ir.feed import limit_chunk, run_sequence
from llmopt.ir.module import Module
from llmopt.ir.ops.moe import moe_experts
from llmopt.ir.rewrite import arguments
from llmopt.ir.samples import CPU
from llmopt.ir.sites import CODES, EMBEDDING_Q, LINEAR_Q, quantized_names, restored, unrounded
from llmopt.report.accuracy import kl_divergence
from llmopt.report.evaluate import Scores, summarize

Progress = Callable[[str, int, int], None]


def prove(
    baseline: Module, built: Module, held_out: Tensor, progress: Progress, device: torch.device = CPU
) -> dict[str, Any]:
    """Scores of ``built`` beside ``baseline`` on windows (m, length + 1), and each quantized call's output error, both
    computed on ``device``."""
    scores, errors, run = Scores(), OutputErrors(built), partial(logits, device=device)
    for index, window in enumerate(held_out):
        ids = window.numpy()
        errors.reset()
        found = run(built, window[:-1], errors.observe)
        scores.add(ids, [(found.numpy(), run(baseline, window[:-1]).numpy())])
        progress("proof", index + 1, len(held_out))
    result = summarize(scores)
    return result | {"window": held_out.shape[1] - 1, "layers": errors.layers()}


def sensitivity(built: Module, held_out: Tensor, progress: Progress, device: torch.device = CPU) -> dict[str, float]:
    """Mean KL, by the name of a quantized weight (of experts: the first), of a model in which it alone is quantized.

    The others, and the reference it is compared with, are as the quantizer found them. One run of the model a weight
    and window.
    """
    names = list(dict.fromkeys(name for name, _ in quantized_calls(built)))
    run = partial(logits, device=device)
    exact = [run(restored(built, keep=()), window[:-1]).numpy() for window in held_out]
    found = {}
    for index, name in enumerate(names):
        alone = restored(built, keep=(name,))
        rows = [kl_divergence(e, run(alone, window[:-1]).numpy()) for e, window in zip(exact, held_out)]
        found[name] = float(np.concatenate(rows).mean())
        progress("sensitivity", index + 1, len(names))
    return found


def logits(
    module: Module,
    tokens: Tensor,
    observe: Callable[[fx.Node, Any], None] | None = None,
    device: torch.device = CPU,
) -> Tensor:
    """fp32 logits (T, V) of one sequence by the function that runs prefill, on the CPU wherever they were computed."""
    name = "step" if "step" in module.functions else "extend"
    chunk = limit_chunk(module, len(tokens))
    chunks = [min(chunk, len(tokens) - start) for start in range(0, len(tokens), chunk)]
    return run_sequence(module, name, tokens.tolist(), chunks, observe, device).float().cpu()


def quantized_calls(module: Module) -> Iterable[tuple[str, fx.Node]]:
    """Name of the (first) weight and call of quantized calls whose original weights are known, in program order."""
    function = module.functions["step" if "step" in module.functions else "extend"]
    for node in function.graph.nodes:
        if node.target in CODES and set(names := quantized_names(node)) <= module.originals.keys():
            yield names[0], node


class OutputErrors:
    """Squared output error of quantized calls, relative to the output of the weights they were made of."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.names = {node: name for name, node in quantized_calls(module)}
        read = [value for node in self.names for value in (unrounded(arguments(node)[0]), *arguments(node)[1:4])]
        self.wanted = {value for value in read if isinstance(value, fx.Node) and value.op != "get_attr"}
        self.inputs: dict[fx.Node, Tensor] = {}
        self.sums = {name: [0.0, 0.0] for name in self.names.values()}

    def reset(self) -> None:
        """Before each window."""
        self.inputs.clear()

    @torch.no_grad()
    def observe(self, node: fx.Node, value: Any) -> None:
        """Sees every value of a run."""
        if node in self.wanted:
            self.inputs[node] = value
        if (name := self.names.get(node)) is None:
            return
        if node.target == EMBEDDING_Q:
            ids = self.inputs[arguments(node)[3]]
            made, exact = value, F.embedding(ids, self.module.originals[name].tensor(ids.device))
        else:
            made, exact = self._linear(node, value) if node.target == LINEAR_Q else (value, self._experts(node))
        self.sums[name][0] += float((made - exact).double().pow(2).sum())
        self.sums[name][1] += float(exact.double().pow(2).sum())

    def _linear(self, node: fx.Node, value: Tensor) -> tuple[Tensor, Tensor]:
        """A linear's result and that of its original weight, both without the bias."""
        given, (name,) = arguments(node), quantized_names(node)
        device = value.device
        exact = F.linear(self.inputs[unrounded(given[0])], self.module.originals[name].tensor(device))
        return value if given[4] is None else value - self.module.weights[str(given[4].target)].tensor(device), exact

    def _experts(self, node: fx.Node) -> Tensor:
        """The result of the experts' original weights."""
        given = arguments(node)
        routed = self.inputs[unrounded(given[0])], self.inputs[given[1]], self.inputs[given[2]]
        device = routed[0].device
        weights = [self.module.originals[name].tensor(device) for name in quantized_names(node)]
        biases = [None if b is None else self.module.weights[str(b.target)].tensor(device) for b in given[9:11]]
        result: Tensor = moe_experts(*routed, *weights, *biases, given[11])
        return result

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
