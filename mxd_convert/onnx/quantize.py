"""8-bit weight quantisation with blockwise scales (onnxruntime's MatMulNBits).

Covers all matrix products with a constant matrix, including the gates. Experts and embeddings keep their dtype, because only
single rows of them are read; so do norms.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

BLOCK = 32  # weights per scale; larger blocks are less exact and no faster
_INT8_ACTIVATIONS = 4  # onnxruntime's accuracy level with int8 by int8 products, the fast ones


def quantize(source: Path, target: Path, data: str | None) -> None:
    """Write the graph `source` with 8-bit weights to `target`. data: name of a separate weights file; None embeds the weights."""
    with _own_logging():
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

        settings = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, accuracy_level=_INT8_ACTIVATIONS, bits=8)
        quantizer = MatMulNBitsQuantizer(onnx.load(source), algo_config=settings)
        quantizer.process()
    quantized = quantizer.model.model
    if data is None:
        onnx.save(quantized, target)
    else:
        onnx.save(quantized, target, save_as_external_data=True, location=data)


@contextmanager
def _own_logging() -> Iterator[None]:
    """Restore the root logger's handlers and level, which the quantiser's import changes, and mute its log line per node."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        root.handlers[:], root.level = handlers, level
        logging.disable(logging.NOTSET)


def as_products(model: ir.Model) -> None:
    """Rewrite all products with a constant matrix as MatMul, the only operator that the quantiser handles.

    Gemm nodes are split, and transposes of constants are folded.
    """
    for node in list(model.graph):
        if node.op_type == "Transpose":
            _transpose(model.graph, node)
        elif node.op_type == "Gemm":
            _split(model.graph, node)


def _transpose(graph: ir.Graph, node: ir.Node) -> None:
    source = node.inputs[0]
    if source is None or source.const_value is None or source.name is None or not source.is_initializer():
        return
    array = np.ascontiguousarray(source.const_value.numpy().transpose(node.attributes["perm"].as_ints()))
    name = f"{source.name}.T"
    if name in graph.initializers:
        constant = graph.initializers[name]
    else:
        constant = ir.Value(name=name, shape=ir.Shape(array.shape), type=source.type, const_value=ir.tensor(array, name=name))
        graph.register_initializer(constant)
    node.outputs[0].replace_all_uses_with(constant)
    graph.remove(node, safe=True)


def _split(graph: ir.Graph, node: ir.Node) -> None:
    """Replace a Gemm with MatMul, and Add for a bias. Scaled or transposed ones, which PyTorch's exporter doesn't write, stay."""
    attributes = node.attributes
    if attributes.get_int("transA", 0) or attributes.get_int("transB", 0):
        return
    if attributes.get_float("alpha", 1.0) != 1.0 or attributes.get_float("beta", 1.0) != 1.0:
        return
    old, name = node.outputs[0], node.outputs[0].name
    steps = [ir.node("MatMul", node.inputs[:2])]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        steps.append(ir.node("Add", [steps[0].outputs[0], node.inputs[2]]))
    for number, step in enumerate(steps):
        step.name = f"{node.name}_{number}"
        step.outputs[0].name = f"{name}_{number}"
        step.outputs[0].shape, step.outputs[0].type = old.shape, old.type
    new = steps[-1].outputs[0]
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.insert_before(node, steps)
    graph.remove(node, safe=True)
    new.name = name
