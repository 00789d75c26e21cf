"""Capture: one ragged-ready graph of a checkpoint's decoder, in the llmopt dialect."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel

from llmopt.errors import LlmoptError, UnsupportedModelError
from llmopt.frontend.checkpoint import Checkpoint
from llmopt.frontend.clean import import_graph
from llmopt.frontend.fold import fold
from llmopt.frontend.hooks import NAME, Capture, installed
from llmopt.frontend.integrity import check_graph, check_interfaces, describe, mixer, unseen_layers
from llmopt.frontend.keeping import keep_codes
from llmopt.frontend.ledger import Ledger, take_ledger
from llmopt.frontend.model import build_model, computed_buffers, model_config, storage_dtype
from llmopt.frontend.names import find_weights
from llmopt.frontend.raising import python_modules, raise_modules, raised_functions
from llmopt.ir.module import ModelConfig, Module, attach
from llmopt.ir.weights import Constant, Weight

EXAMPLE_ROWS = 7


@dataclass(frozen=True)
class Captured:
    """A captured module (function ``step``) and the ledger of what it covers."""

    module: Module
    ledger: Ledger


class Step(nn.Module):
    """The traced forward: input_ids and position_ids (1, T) int64 give logits (1, T, V)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model_to_capture = model

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Logits of every row; no cache, no padding mask."""
        return self.model_to_capture(  # type: ignore[no-any-return]
            input_ids=input_ids, position_ids=position_ids, use_cache=False
        ).logits


def capture(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = None,
    max_context: int | None = None,
    dequantize: Sequence[str] = (),
) -> Captured:
    """Capture a checkpoint's decoder in ``dtype`` (None: the checkpoint's) for at most ``max_context`` tokens.

    Weights stored quantized keep their codes, but those whose names fit a pattern of ``dequantize``.

    Reads no tensor data, except to compare tied tensors that are stored twice. Raises UnsupportedModelError naming
    the module that cannot be captured, CheckpointError on tensors that are missing or contradict the config,
    ConfigError on a ``max_context`` the model has no positions for.
    """
    model = build_model(checkpoint, dtype)
    config = model_config(checkpoint, model, max_context)
    weights = find_weights(checkpoint, model)
    buffers = computed_buffers(model)
    check_interfaces(model)
    state = Capture({module: path for path, module in model.named_modules()})
    tables, known = raise_modules(model, state, config.max_context)
    modules = python_modules(model)
    with installed(state, modules), raised_functions(modules, tables):
        program = export(model, config, state)
    graph = import_graph(program)
    table = rename_weights(graph, weights, {**buffers, **known})
    fold(graph, table)
    module = make_module(graph, table, config)
    keep_codes(module, dtype or storage_dtype(checkpoint), dequantize)
    switch = check_graph(module, model, state)
    module.rope_switch = switch
    return Captured(module, take_ledger(graph))


def export(model: PreTrainedModel, config: ModelConfig, state: Capture) -> ExportedProgram:
    """Trace the model with a symbolic number of rows T; raises UnsupportedModelError when tracing fails."""
    rows = Dim("T", min=1, max=max(config.max_context, 2 * EXAMPLE_ROWS))
    inputs = tuple(torch.zeros(1, EXAMPLE_ROWS, dtype=torch.int64, device="meta") for _ in range(2))
    shapes = {"input_ids": {1: rows}, "position_ids": {1: rows}}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(Step(model), inputs, dynamic_shapes=shapes, strict=False)
    except LlmoptError:
        raise
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        if first.startswith("Constraints violated"):
            first = "what it computes depends on the number of rows"
        raise UnsupportedModelError(f"tracing failed: {first}", where=failing_module(error, model, state)) from error


def failing_module(error: BaseException, model: PreTrainedModel, state: Capture) -> str:
    """Path and class of the innermost module whose forward was running, else of a mixer no hook has seen."""
    found: nn.Module = model
    names, trace = {id(module) for module in model.modules()}, error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            found = owner
        trace = trace.tb_next
    if found is model:
        found = next((mixer(layer) for layer in unseen_layers(model, state)), model)
    return describe(model, found)


def rename_weights(
    graph: fx.Graph, weights: dict[str, tuple[str, Weight]], constants: dict[str, Tensor]
) -> dict[str, Weight]:
    """Point get_attr nodes at the table's names, one node a weight; returns the table."""
    table: dict[str, Weight] = {}
    nodes: dict[str, fx.Node] = {}
    for node in graph.find_nodes(op="get_attr"):
        path = str(node.target)
        if path in weights:
            name, weight = weights[path]
        elif path in constants:
            name, weight = path, Constant(constants[path])
        else:
            raise UnsupportedModelError(f"the trace holds a constant tensor {path}", where=node.name)
        table[name] = weight
        if name in nodes:
            node.replace_all_uses_with(nodes[name])
            graph.erase_node(node)
        else:
            node.target, nodes[name] = name, node
    return table


def make_module(graph: fx.Graph, table: dict[str, Weight], config: ModelConfig) -> Module:
    """A Module of one function, ``step``."""
    root = nn.Module()
    for node in graph.find_nodes(op="get_attr"):
        attach(root, str(node.target), node.meta["val"])
    rows = next(iter(graph.find_nodes(op="placeholder"))).meta["val"].shape[1]
    function = fx.GraphModule(root, graph)
    module = Module({"step": function}, table, {"T": (1, config.max_context)}, {str(rows.node.expr): "T"}, config)
    module.prune_weights()
    return module


__all__ = ["NAME", "Captured", "capture"]
