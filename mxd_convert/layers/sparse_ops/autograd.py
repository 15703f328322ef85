"""The two sparse operations, forward and backward. They save tensors of the input's size and (B, K), never (B, N)."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mxd_convert.layers.sparse_ops import reference

CHUNK_BYTES = {"cpu": 2**23, "cuda": 2**28}  # bytes of gate values per chunk: fit a CPU's cache, keep a GPU busy
MIN_ROWS = 512  # fewest tokens per chunk: smaller products repack the weight too often


def primitives(device: torch.device) -> ModuleType:
    """Return the module with the primitives for a device: `kernels` on a GPU with Triton, otherwise `reference`."""
    if device.type == "cuda":
        from mxd_convert.layers.sparse_ops import kernels

        if kernels.AVAILABLE:
            return kernels
    return reference


def top_k(gate_BN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values of each row, unordered, as (values, indices), (B, K). Exact; ties are broken arbitrarily."""
    return primitives(gate_BN.device).top_k(gate_BN, k)


class RowGradient:
    """The gradient of a parameter of N rows in factored form, so that an optimiser can compute a few rows at a time.

    An operation that gets one as its `sink` adds to it instead of to `.grad`. Several backward passes accumulate.
    """

    def __init__(self) -> None:
        self._terms: list[tuple[reference.Routing, Tensor]] = []

    def add(self, routing: reference.Routing, source_BD: Tensor) -> None:
        """Add the gradient of one backward pass, see `sum_by_expert`."""
        self._terms.append((routing, source_BD))

    def empty(self) -> bool:
        """Return whether no gradient was added since the last `clear`."""
        return not self._terms

    def rows(self, first: int = 0, last: int | None = None) -> Tensor:
        """Return rows `first` to `last - 1` of the gradient, (rows, D); by default all. Raises IndexError if it is empty."""
        sums = [primitives(source.device).sum_by_expert(routing, source, first, last) for routing, source in self._terms]
        total = sums[0]
        for other in sums[1:]:
            total = total + other
        return total

    def clear(self) -> None:
        """Remove the gradient."""
        self._terms.clear()


def sparse_gate(
    x_BD: Tensor, weight_ND: Tensor, bias_N: Tensor, k: int, sink: RowGradient | None = None
) -> tuple[Tensor, Tensor]:
    """Return the k largest entries of `ReLU(x weight^T + bias)` per token, as (values, indices), (B, K).

    The product is computed in chunks of tokens, in the autocast dtype under autocast. Gradients accumulate in the weight's
    dtype, and only rows of experts with a positive gate value get one. x gets a gradient if it requires one.

    Args:
        x_BD: layer input.
        weight_ND: gate weight.
        bias_N: gate bias.
        k: number of active experts per token.
        sink: receives the weight's gradient instead of `weight.grad`.

    Returns:
        Values and indices. Where a value is 0, its index is arbitrary.
    """
    device = x_BD.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_ND.dtype
    values_BK, indices_BK = _SparseGate.apply(x_BD, weight_ND, bias_N, k, compute, sink)  # type: ignore[no-untyped-call]
    return values_BK, indices_BK


def weighted_rows(values_BK: Tensor, indices_BK: Tensor, rows_ND: Tensor, sink: RowGradient | None = None) -> Tensor:
    """Return `sum_k values[b, k] * rows[indices[b, k]]`, (B, D), in the rows' dtype: the gain `C^T a` of an MxD.

    Pairs of value 0 add nothing to the sum or to the rows' gradient. sink: receives the rows' gradient instead of `rows.grad`.
    """
    return _WeightedRows.apply(values_BK, indices_BK, rows_ND, sink)  # type: ignore[no-untyped-call]


class _SparseGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BD: Tensor, weight_ND: Tensor, bias_N: Tensor, k: int, compute: torch.dtype, sink: RowGradient | None
    ) -> tuple[Tensor, Tensor]:
        ctx.sink = sink
        ops = primitives(x_BD.device)
        weight, bias, x = (tensor.detach().to(compute) for tensor in (weight_ND, bias_N, x_BD))
        values_BK = x_BD.new_empty((len(x), k), dtype=weight_ND.dtype)
        indices_BK = x_BD.new_empty((len(x), k), dtype=torch.int64)
        rows = rows_a_chunk(x.device.type, len(weight_ND) * weight.element_size())
        for start in range(0, len(x), rows):
            chunk = slice(start, start + rows)
            values_BK[chunk], indices_BK[chunk] = ops.top_k(reference.gate_values(x[chunk], weight, bias), k)
        values_BK.relu_()
        ctx.save_for_backward(x_BD, weight_ND, values_BK, indices_BK)
        ctx.mark_non_differentiable(indices_BK)
        return values_BK, indices_BK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BK: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x_BD, weight_ND, values_BK, indices_BK = ctx.saved_tensors
        ops = primitives(x_BD.device)
        grad_BK = grad_BK.masked_fill(values_BK <= 0, 0)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = ops.sum_rows(grad_BK, indices_BK, weight_ND).to(x_BD.dtype)
        routing = ops.route(grad_BK, indices_BK, len(weight_ND))
        if ctx.needs_input_grad[1]:
            grad_weight = _gradient(ctx.sink, routing, x_BD.to(weight_ND.dtype))
        if ctx.needs_input_grad[2]:
            grad_bias = ops.sum_by_expert(routing, grad_BK.new_ones(len(x_BD), 1)).squeeze(1)
        return grad_x, grad_weight, grad_bias, None, None, None


def _gradient(sink: RowGradient | None, routing: reference.Routing, source_BD: Tensor) -> Tensor | None:
    if sink is None:
        return primitives(source_BD.device).sum_by_expert(routing, source_BD)
    sink.add(routing, source_BD)
    return None


def rows_a_chunk(device: str, row_bytes: int) -> int:
    """Return the number of tokens per chunk of gate values, a power of two, which suits matrix products."""
    fitting = CHUNK_BYTES.get(device, CHUNK_BYTES["cpu"]) // max(1, row_bytes)
    return max(MIN_ROWS, 1 << max(0, fitting.bit_length() - 1))


class _WeightedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_BK: Tensor, indices_BK: Tensor, rows_ND: Tensor, sink: RowGradient | None) -> Tensor:
        ctx.sink = sink
        ctx.save_for_backward(values_BK, indices_BK, rows_ND)
        return primitives(rows_ND.device).sum_rows(values_BK.to(rows_ND.dtype), indices_BK, rows_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BD: Tensor) -> tuple[Tensor | None, ...]:
        values_BK, indices_BK, rows_ND = ctx.saved_tensors
        ops = primitives(rows_ND.device)
        grad_BD = grad_BD.to(rows_ND.dtype)
        grad_values = grad_rows = None
        if ctx.needs_input_grad[0]:
            grad_values = ops.row_products(grad_BD, indices_BK, rows_ND).to(values_BK.dtype)
        if ctx.needs_input_grad[2]:
            routing = ops.route(values_BK.to(rows_ND.dtype), indices_BK, len(rows_ND))
            grad_rows = _gradient(ctx.sink, routing, grad_BD)
        return grad_values, None, grad_rows, None
