"""Streams token windows through a module's function, piece by piece, with activations kept on disk between pieces."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, fx

from llmopt.calibration.spool import Spool, save_atomically, scalar
from llmopt.errors import PassError
from llmopt.ir.interpret import Run
from llmopt.ir.module import Module
from llmopt.ir.samples import Calibration


class Walk:
    """Runs every window up to a node, then the next one, and so on; nodes already run may be rewritten between.

    Memory holds the weights of one piece and one window's activations. What later nodes need of a window is a file in
    ``boundary-<i>``; a finished boundary is renamed into place, and one found in the spool's folder is taken up again:
    stops before it cost nothing.
    """

    def __init__(
        self,
        module: Module,
        function: fx.GraphModule,
        calibration: Calibration,
        spool: Spool,
        stops: int = 1,
        what: str = "calibration",
    ) -> None:
        """``stops`` there will be, and ``what`` they are for, on the progress bar."""
        self.module, self.graph, self.spool = module, function.graph, spool
        self.windows, self.progress, self.device = calibration.windows, calibration.progress, calibration.device
        self.stops, self.what = stops, what
        found = sorted(spool.folder.glob("boundary-[0-9]*"), key=number)
        self.boundary = number(found[-1]) if found else -1
        """Index of the stop whose activations are on disk (-1: none, the windows themselves are all there is)."""
        self.visited = -1
        self.last: fx.Node | None = None
        self.factors: dict[fx.Node, Tensor] = {}

    def advance(self, stop: fx.Node) -> None:
        """Run everything before ``stop``. Stops come in program order."""
        self.visited += 1
        if self.visited > self.boundary:
            self._run(stop)
            self.boundary = self.visited
        self.last = stop.prev

    @property
    def current(self) -> bool:
        """Whether the activations on disk are those of the stop advanced to last."""
        return self.visited == self.boundary

    def values(self, node: fx.Node) -> Iterator[Tensor]:
        """A node's value of each window; the node must be needed by the stop or a later one."""
        for index in range(len(self.windows)):
            with safe_open(self._file(self.boundary, index), framework="pt") as opened:
                value: Tensor = opened.get_tensor(node.name).to(self.device)
            yield (value * self.factors[node]).to(value.dtype) if node in self.factors else value

    def rescale(self, node: fx.Node, factor: Tensor) -> None:
        """Multiply a value, if the stop needs it, because what made it was rewritten to give so much more."""
        if self.current:
            self.factors[node] = factor.to(self.device)

    def _run(self, stop: fx.Node) -> None:
        piece = self._piece(stop)
        kept = self._needed(stop)
        weights = {
            source: self.module.weights[str(source.target)].tensor(self.device)
            for source in {s: None for node in piece for s in node.all_input_nodes if s.op == "get_attr"}
        }
        folder = self._folder(self.visited)
        aside = folder.with_name(f"partial-{self.visited}")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for index in range(len(self.windows)):
            values = self._window(index, piece, weights)
            tensors: dict[str, Tensor] = {}
            for node in kept:
                tensors |= flatten(node.name, values[node])
            save_atomically(aside / f"{index:05d}.safetensors", tensors)
            count = len(self.windows)
            self.progress(self.what, self.visited * count + index + 1, self.stops * count)
        aside.rename(folder)
        shutil.rmtree(self._folder(self.boundary), ignore_errors=True)
        self.factors.clear()

    @torch.no_grad()
    def _window(self, index: int, piece: list[fx.Node], weights: dict[fx.Node, Tensor]) -> dict[fx.Node, Any]:
        tokens = self.windows[index : index + 1].to(self.device)
        given = {"input_ids": tokens, "position_ids": torch.arange(tokens.shape[1], device=self.device)[None]}
        run = Run(self.module, given)
        for node in self.graph.find_nodes(op="placeholder"):
            if node.name not in given:
                what = f"the function already has the input {node.name}"
                raise PassError(what, where="calibration", hint="calibrate before rewrite_kv_cache")
            run.values[node] = run.value(node)
        run.values |= weights | self._saved(index)
        for node in piece:
            run.values[node] = run.value(node)
        return run.values

    def _saved(self, index: int) -> dict[fx.Node, Any]:
        if self.boundary < 0:
            return {}
        by_name = {node.name: node for node in self.graph.nodes}
        tensors: dict[fx.Node, dict[str, Tensor]] = {}
        with safe_open(self._file(self.boundary, index), framework="pt") as opened:
            for name in list(opened.keys()):
                tensors.setdefault(by_name[name.split("|")[0]], {})[name] = opened.get_tensor(name).to(self.device)
        values = {node: restore(node, found) for node, found in tensors.items()}
        for node in values.keys() & self.factors.keys():
            values[node] = (values[node] * self.factors[node]).to(values[node].dtype)
        return values

    def _before(self, last: fx.Node | None) -> list[fx.Node]:
        if last is None:
            return []
        nodes = []
        for node in self.graph.nodes:
            nodes.append(node)
            if node is last:
                break
        return nodes

    def _piece(self, stop: fx.Node) -> list[fx.Node]:
        done = set(self._before(self.last))
        before = self._before(stop.prev)
        return [n for n in before if n.op == "call_function" and n not in done]

    def _needed(self, stop: fx.Node) -> list[fx.Node]:
        before = self._before(stop.prev)
        known = set(before)
        return [n for n in before if n.op == "call_function" and any(user not in known for user in n.users)]

    def _folder(self, boundary: int) -> Path:
        return self.spool.folder / f"boundary-{boundary}"

    def _file(self, boundary: int, index: int) -> Path:
        return self._folder(boundary) / f"{index:05d}.safetensors"


def number(folder: Path) -> int:
    """The index of a boundary's folder."""
    return int(folder.name.split("-")[1])


def flatten(name: str, value: Any) -> dict[str, Tensor]:
    """A node's value as named tensors: ``name``, ``name|int``, or ``name|0``, ``name|1`` of a tuple."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, int):
        return {f"{name}|int": scalar(value)}
    return {f"{name}|{i}": item for i, item in enumerate(value)}


def restore(node: fx.Node, tensors: dict[str, Tensor]) -> Any:
    """Inverse of flatten."""
    if node.name in tensors:
        return tensors[node.name]
    if f"{node.name}|int" in tensors:
        return int(tensors[f"{node.name}|int"])
    return [tensors[f"{node.name}|{i}"] for i in range(len(tensors))]
