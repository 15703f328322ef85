"""A converted model as one ONNX graph for prefill and decoding, with the names that runtimes expect.

Inputs:
    input_ids, attention_mask, position_ids, past_key_values.{i}.key, past_key_values.{i}.value
    steering.layers, steering.experts, steering.amounts   (S) each, optional: amounts to add to coefficients

Outputs:
    logits, present.{i}.key, present.{i}.value
    experts.{i}.indices, experts.{i}.values               (B, T, K): active experts of layer i and their coefficients

Dimensions are named batch_size, sequence_length and past_sequence_length. Shape suffixes: B rows, T tokens, P past tokens,
H attention heads, D width of a head, K active experts, S steering orders, I input width, O output width, N experts.
"""

import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import Tensor, nn
from torch.export import Dim
from transformers import DynamicCache

from mxd_convert.modeling.layers_mxd import Coefficients, FactoredLayer, Gain
from mxd_convert.onnx.sparse_gain import sparse_gain, spell_out

STEERING = ("steering.layers", "steering.experts", "steering.amounts")
TOTAL = "past_sequence_length + sequence_length"
# sizes of the traced example: the exporter would treat a size of 0 or 1 as constant
_BATCH, _TOKENS, _PAST, _STEERED = 2, 3, 5, 2


class _Steering:
    """The graph's steering inputs during tracing; None if the graph has none."""

    inputs: tuple[Tensor, Tensor, Tensor] | None = None


class _TracedGain(nn.Module):
    """Replaces a layer's Gain while it is traced.

    Adds the checkpoint's steering and the graph's steering inputs to the gain. `known`: the gain, if already computed.
    """

    def __init__(self, index: int, steering: _Steering) -> None:
        super().__init__()
        self.index, self.steering = index, steering
        self.product = Gain()
        self.known: Tensor | None = None

    def forward(self, coefficients: Coefficients, experts_NO: Tensor, changes: Sequence[tuple[int, Tensor]] = ()) -> Tensor:
        gain_BTO = self.product(coefficients, experts_NO) if self.known is None else self.known
        for expert, change_BT in changes:
            gain_BTO = gain_BTO + change_BT.to(gain_BTO.dtype).unsqueeze(-1) * experts_NO[expert]
        if self.steering.inputs is None:
            return gain_BTO
        layers_S, experts_S, amounts_S = self.steering.inputs
        here_S = layers_S == self.index
        rows_SO = experts_NO[torch.where(here_S, experts_S, 0)]
        amounts_S = torch.where(here_S, amounts_S, 0.0).to(experts_NO.dtype)
        return gain_BTO + (amounts_S.unsqueeze(-1) * rows_SO).sum(0)


class _TracedLayer(nn.Module):
    """Replaces a layer while it is traced: gate, top-k and weighted sum are one node.

    `seen`: (indices, values) of the active experts; (values) of all experts with L1.
    """

    def __init__(self, index: int, layer: FactoredLayer, steering: _Steering) -> None:
        super().__init__()
        self.layer, self.steering = layer, layer.steering
        self.seen: tuple[Tensor, ...] = ()
        if layer.experts is not None:
            layer._modules["gain"] = _TracedGain(index, steering)

    def forward(self, x_BTI: Tensor) -> Tensor:
        layer = self.layer
        if layer.experts is None:
            return layer(x_BTI)
        if layer.sparsity == "l1":
            coefficients: Coefficients = layer.encode(x_BTI)
            self.seen = (coefficients,) if isinstance(coefficients, Tensor) else coefficients
            return layer.combine(x_BTI, coefficients)
        gate = layer.gate
        layer.gain.known, values, indices = sparse_gain(x_BTI, gate.weight.T, gate.bias, layer.experts, layer.k)
        self.seen = (indices, values)
        return layer.combine(x_BTI, (values, indices))


class _Wrapper(nn.Module):
    """The model with a flat list of keys and values as its cache. Returns logits, present cache and experts."""

    def __init__(self, model: Any, steering: _Steering, positions: bool) -> None:
        super().__init__()
        self.model, self.steering, self.positions = model, steering, positions
        self.traced: dict[int, _TracedLayer] = {}
        for index, layer in model.mxd_layers().items():
            self.traced[index] = _TracedLayer(index, layer, steering)
            parent, _, name = model._mxd_path(index).rpartition(".")
            setattr(model.get_submodule(parent), name, self.traced[index])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        past: Sequence[Tensor] = (),
        steering: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        self.steering.inputs = steering
        cache = DynamicCache()  # no config, so no sliding window: clients keep the full past, and the mask applies the window
        for index in range(len(past) // 2):
            cache.update(past[2 * index], past[2 * index + 1], index)
        at = {"position_ids": position_ids} if self.positions else {}
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, return_dict=True, **at
        )
        present = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
        # some models flatten (B, T) before their MLPs
        experts = [seen.reshape(*input_ids.shape, -1) for traced in self.traced.values() for seen in traced.seen]
        return (output.logits.float(), *present, *experts)


@torch.no_grad()
def build_graph(model: Any, opset: int, steering: bool) -> ir.Model:
    """Return the ONNX graph of a converted model. It modifies `model`, which can't be used afterwards.

    Weights and cache have the model's dtype, logits are float32. The outputs include the experts of every layer.
    """
    model.set_attn_implementation("eager")  # other implementations add a costly guard for rows without keys, which never occur
    positions = "position_ids" in inspect.signature(type(model).forward).parameters
    dtype = model.dtype
    past_BHPD = _example_past(model)
    wrapper = _Wrapper(model, _Steering(), positions).eval()
    room = getattr(model.config, "max_position_embeddings", None)
    # the past is limited because some models have a mask buffer of `room` positions
    batch, tokens, past = Dim("batch_size"), Dim("sequence_length"), Dim("past_sequence_length", max=room)
    mask = torch.ones(_BATCH, _PAST + _TOKENS, dtype=torch.int64)
    mask[0, :2] = 0  # some padding on the left, or the exporter would drop the mask from the graph
    inputs: dict[str, Any] = {"input_ids": torch.ones(_BATCH, _TOKENS, dtype=torch.int64), "attention_mask": mask}
    dynamic: dict[str, Any] = {"input_ids": {0: batch, 1: tokens}, "attention_mask": {0: batch, 1: Dim.AUTO}}
    if positions:
        inputs["position_ids"] = torch.arange(_PAST, _PAST + _TOKENS).expand(_BATCH, -1).contiguous()
        dynamic["position_ids"] = {0: batch, 1: tokens}
    inputs["past"], dynamic["past"] = past_BHPD, [{0: batch, 2: past}] * len(past_BHPD)
    if steering:
        inputs["steering"] = (torch.tensor([0, 1]), torch.tensor([0, 0]), torch.zeros(_STEERED))
        dynamic["steering"] = ({0: Dim("steered")},) * 3
    count = range(len(past_BHPD) // 2)
    names = ["input_ids", "attention_mask", *(["position_ids"] if positions else [])]
    names += [f"past_key_values.{i}.{part}" for i in count for part in ("key", "value")] + (list(STEERING) if steering else [])
    outputs = ["logits"] + [f"present.{i}.{part}" for i in count for part in ("key", "value")]
    for index, layer in wrapper.traced.items():
        outputs += [f"experts.{index}.{part}" for part in expert_parts(layer.layer)]
    with _silence():
        program = torch.onnx.export(
            wrapper,
            kwargs=inputs,
            dynamo=True,
            opset_version=opset,
            input_names=names,
            output_names=outputs,
            dynamic_shapes=dynamic,
            verbose=False,
        )
    assert program is not None
    paths = [model._mxd_path(index) for index in wrapper.traced]
    return _tidied(spell_out(program.model, opset, dtype), paths, steering)


def expert_parts(layer: FactoredLayer) -> tuple[str, ...]:
    """Return the names of a layer's expert outputs: none without experts, only "values", (B, T, N), with `sparsity: l1`."""
    if layer.experts is None:
        return ()
    return ("values",) if layer.sparsity == "l1" else ("indices", "values")


def _example_past(model: Any) -> list[Tensor]:
    """Return keys and values of every layer, (B, H, P, D), of a cache in the model's format, filled with noise."""
    ids = torch.ones(_BATCH, _PAST, dtype=torch.int64)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    return [torch.randn_like(tensor) for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _tidied(model: ir.Model, paths: list[str], steering: bool) -> ir.Model:
    """Return the graph without metadata of this machine, with the checkpoint's weight names and optional steering inputs.

    paths: module paths of the converted layers.
    """
    for graph in (model.graph, *model.graph.subgraphs()):
        graph.metadata_props.clear()
        graph.doc_string = None
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
    model.metadata_props.clear()
    model.doc_string, model.graph.name = None, "mxd"
    model.producer_name, model.producer_version = "mxd-convert", None
    for value in list(model.graph.initializers.values()):
        if value.name is not None and value.name.startswith("model."):
            value.name = value.name.removeprefix("model.")
            for path in paths:
                value.name = value.name.replace(f"{path}.layer.", f"{path}.")
    unnamed = model.graph.inputs[1].shape
    assert unnamed is not None
    unnamed[1] = ir.SymbolicDim(TOTAL)
    for fold in (common.RemoveUnusedNodesPass(), common.CommonSubexpressionEliminationPass(), common.RemoveUnusedOpsetsPass()):
        model = fold(model).model
    if steering:
        _make_optional(model.graph)
    return model


def _make_optional(graph: ir.Graph) -> None:
    """Give the steering inputs a default, which steers no layer."""
    defaults = (np.array([-1]), np.array([0]), np.array([0.0], dtype=np.float32))
    for value in graph.inputs:
        if value.name in STEERING:
            value.const_value = ir.tensor(defaults[STEERING.index(value.name)], name=value.name)
            graph.register_initializer(value)


def without_experts(model: ir.Model) -> ir.Model:
    """Return the graph without its expert outputs."""
    kept = [value for value in model.graph.outputs if not str(value.name).startswith("experts.")]
    model.graph.outputs.clear()
    model.graph.outputs.extend(kept)
    return common.RemoveUnusedNodesPass()(model).model


@contextmanager
def _silence() -> Iterator[None]:
    """Mute the exporter's messages, which are for developers who port models."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
