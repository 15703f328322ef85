"""The gain of a sparse layer as a subgraph: gate, top-k, and the weighted sum of the active experts' rows.

Tokens are processed in chunks, so memory (N gate values and K rows per token) does not grow with the prompt. Chunks have the
same length: the last is padded with zeros, which are cut off afterwards. A single chunk, as in decoding, adds no cost.
Shape suffixes: B rows, T tokens, I input width, O output width, N experts, K active experts.
"""

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass
from torch import Tensor

DOMAIN, NAME = "mxd_convert", "SparseGain"
CHUNK = 256  # tokens per chunk: enough that the gate's product is not limited by reading the weight

_FUNCTION = """
<opset_import: ["" : {opset}], domain: "{domain}">
{name} <k> (x, gate, bias, experts) => (gain, values, indices)
{{
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    rest = Constant <value_ints = [-1]> ()
    most = Constant <value_ints = [{chunk}]> ()
    lead = Shape <start = 0, end = -1> (x)
    width = Shape <start = -1> (x)
    flat_shape = Concat <axis = 0> (rest, width)
    flat = Reshape (x, flat_shape)

    tokens = Shape <start = 0, end = 1> (flat)
    tokens_up = Add (tokens, most)
    tokens_round = Sub (tokens_up, one)
    chunks = Div (tokens_round, most)
    share_up = Add (tokens, chunks)
    share_round = Sub (share_up, one)
    length = Div (share_round, chunks)
    filled_tokens = Mul (chunks, length)
    lacking = Sub (filled_tokens, tokens)
    pads = Concat <axis = 0> (zero, zero, lacking, zero)
    filled = Pad (flat, pads)
    chunked_shape = Concat <axis = 0> (chunks, length, width)
    chunked = Reshape (filled, chunked_shape)

    chunk_gains, chunk_values, chunk_indices = Scan <num_scan_inputs = 1, body = sparse_gain_of_chunk
        ({type}[m, i] x_m) => ({type}[m, o] gain_m, {type}[m, k] values_m, int64[m, k] indices_m)
        {{
            product_m = MatMul (x_m, gate)
            gates_m = Add (product_m, bias)
            count = Constant <value_ints : ints = @k> ()
            top_m, indices_m = TopK <axis = -1, largest = 1, sorted = 0> (gates_m, count)
            values_m = Relu (top_m)
            rows_m = Gather <axis = 0> (experts, indices_m)
            between = Constant <value_ints = [1]> ()
            weights_m = Unsqueeze (values_m, between)
            sums_m = MatMul (weights_m, rows_m)
            gain_m = Squeeze (sums_m, between)
        }}> (chunked)

    {cut_gain}
    {cut_values}
    {cut_indices}
}}
"""

# (chunks, length, ...) -> (filled tokens, ...) -> (tokens, ...) -> (B, T, ...)
_CUT = """
    shape_{what} = Shape <start = 2> (chunk_{whats})
    flat_shape_{what} = Concat <axis = 0> (rest, shape_{what})
    flat_{what} = Reshape (chunk_{whats}, flat_shape_{what})
    cut_{what} = Slice (flat_{what}, zero, tokens, zero)
    lead_shape_{what} = Concat <axis = 0> (lead, shape_{what})
    {out} = Reshape (cut_{what}, lead_shape_{what})
"""


def sparse_gain(x_BTI: Tensor, gate_IN: Tensor, bias_N: Tensor, experts_NO: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (gain (B, T, O), values (B, T, K), indices (B, T, K)) of one symbolic node, which computes nothing itself."""
    lead = x_BTI.shape[:-1]
    gain, values, indices = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{NAME}",
        (x_BTI, gate_IN, bias_N, experts_NO),
        {"k": [k]},
        dtypes=(x_BTI.dtype, x_BTI.dtype, torch.int64),
        shapes=((*lead, experts_NO.shape[1]), (*lead, k), (*lead, k)),
        version=1,
    )
    return gain, values, indices


def spell_out(model: ir.Model, opset: int, dtype: torch.dtype) -> ir.Model:
    """Return the graph with every `sparse_gain` node replaced by standard ONNX operators."""
    text = _FUNCTION.format(
        opset=opset,
        domain=DOMAIN,
        name=NAME,
        chunk=CHUNK,
        type="float16" if dtype == torch.float16 else "float",
        cut_gain=_CUT.format(what="gain", whats="gains", out="gain"),
        cut_values=_CUT.format(what="value", whats="values", out="values"),
        cut_indices=_CUT.format(what="index", whats="indices", out="indices"),
    )
    function = ir.serde.deserialize_function(onnx.parser.parse_function(text))
    model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = 1
    spelt_out = InlinePass()(model).model
    spelt_out.functions.clear()
    spelt_out.opset_imports.pop(DOMAIN, None)
    return spelt_out
