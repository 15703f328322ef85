"""The sparse primitives in torch, used on CPUs and as the reference for the Triton kernels."""

import functools
import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mxd_convert.layers.sparse_ops import selection

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


class Routing(NamedTuple):
    """Pairs of a token and an active expert, sorted by expert, then by token.

    tokens_M, weights_M: token and weight of each pair. starts_N1: first pair of each expert; the last entry is M.
    """

    tokens_M: Tensor
    weights_M: Tensor
    starts_N1: Tensor


def gate_values(x_BD: Tensor, weight_ND: Tensor, bias_N: Tensor) -> Tensor:
    """Return the gate values `x weight^T + bias`, (B, N)."""
    if x_BD.dtype == torch.bfloat16 and x_BD.device.type == "cpu" and _fuses_bias():
        # `linear` writes the bias to the whole output before it adds the product; oneDNN fuses the two
        values: Tensor = torch.ops.mkldnn._linear_pointwise(x_BD, weight_ND, bias_N, "none", [], "")
        return values
    return F.linear(x_BD, weight_ND, bias_N)


@functools.cache
def _fuses_bias() -> bool:
    """Return whether oneDNN supports bfloat16 products on this CPU. torch.compile makes the same check."""
    mkldnn = torch.ops.mkldnn
    return hasattr(mkldnn, "_linear_pointwise") and bool(mkldnn._is_mkldnn_bf16_supported())


def route(weights_BK: Tensor, indices_BK: Tensor, n_experts: int) -> Routing:
    """Return the pairs sorted by expert. The sort is stable, so sums are always taken in the same order."""
    flat_M = indices_BK.flatten()
    pairs_M = stable_order(flat_M, n_experts)
    starts_N1 = flat_M.new_zeros(n_experts + 1)
    starts_N1[1:] = flat_M.bincount(minlength=n_experts).cumsum(0)
    return Routing(pairs_M // max(indices_BK.shape[1], 1), weights_BK.flatten()[pairs_M], starts_N1)


def stable_order(keys_M: Tensor, n: int) -> Tensor:
    """Return the order that sorts integers from 0 to n - 1, (M). Equal ones keep their order.

    On the CPU numpy sorts 16 bits at a time by radix, which takes a small part of the time of torch's sort.
    """
    if keys_M.device.type != "cpu":
        return keys_M.argsort(stable=True)
    keys = keys_M.numpy()
    order = np.argsort(keys.astype(np.uint16), kind="stable")  # by the lower 16 bits
    if n > 2**16:
        order = order[np.argsort((keys >> 16)[order].astype(np.uint16), kind="stable")]
    return torch.from_numpy(order)


def top_k(gate_BN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values of each row, unordered, as (values, indices), (B, K). Exact.

    For many experts the search has two stages. The k largest values of a row lie in the k groups with the largest maxima,
    so only the members of these groups are searched.
    """
    n_experts = gate_BN.shape[-1]
    group = _group(n_experts, k)
    columns = n_experts // group  # group c has the experts c, c + columns, ...: the maximum then vectorises over groups
    if group == 1 or k > columns:
        indices_BK = _largest(gate_BN, k)
        return gate_BN.gather(1, indices_BK), indices_BK
    body = columns * group
    groups_BK = _largest(gate_BN[:, :body].unflatten(1, (group, columns)).amax(1), k)
    members_G = torch.arange(0, body, columns, device=gate_BN.device)
    candidates = (groups_BK.unsqueeze(1) + members_G.unsqueeze(-1)).flatten(1)
    if body < n_experts:  # experts that don't fill a group
        rest = torch.arange(body, n_experts, device=gate_BN.device).expand(len(gate_BN), -1)
        candidates = torch.cat((candidates, rest), dim=1)
    values = gate_BN.gather(1, candidates)
    chosen_BK = _largest(values, k)
    return values.gather(1, chosen_BK), candidates.gather(1, chosen_BK)


def _group(n_experts: int, k: int) -> int:
    """Return the number of experts per group, a power of two; 1 for a single stage.

    The stages search N / group and k * group values, which are equally many for a group of sqrt(N / k).
    """
    return 1 << (math.isqrt(max(1, n_experts // max(1, k))).bit_length() - 1)


def _largest(values_BN: Tensor, k: int) -> Tensor:
    """Return the columns of the k largest values of each row, unordered, (B, K)."""
    if values_BN.device.type == "cpu" and values_BN.numel() and k:
        return selection.largest(values_BN, k)
    return values_BN.topk(k, dim=-1, sorted=False).indices


def sum_rows(weights_BK: Tensor, indices_BK: Tensor, rows_ND: Tensor) -> Tensor:
    """Return `sum_k weights[b, k] * rows[indices[b, k]]`, (B, D)."""
    return F.embedding_bag(indices_BK, rows_ND, per_sample_weights=weights_BK, mode="sum")


def row_products(left_BD: Tensor, indices_BK: Tensor, rows_ND: Tensor) -> Tensor:
    """Return the dot products `<left[b], rows[indices[b, k]]>`, (B, K)."""
    (tokens, k), device = indices_BK.shape, left_BD.device
    if indices_BK.numel() == 0:
        return left_BD.new_zeros(tokens, k)
    starts_B1 = torch.arange(0, tokens * k + 1, k, device=device)
    zeros_M = left_BD.new_zeros(tokens * k)
    mask = torch.sparse_csr_tensor(starts_B1, indices_BK.flatten(), zeros_M, (tokens, len(rows_ND)), check_invariants=False)
    return torch.sparse.sampled_addmm(mask, left_BD, rows_ND.T, beta=0.0).values().view(tokens, k)


def sum_by_expert(routing: Routing, source_BD: Tensor, first: int = 0, last: int | None = None) -> Tensor:
    """Return each expert's sum of `weight * source[token]` over its pairs, (last - first, D).

    Covers experts `first` to `last - 1`; None means N. Rows of experts without pairs are 0.
    """
    starts = routing.starts_N1[first : None if last is None else last + 1]
    begin, end = (0, len(routing.tokens_M)) if last is None and first == 0 else (int(starts[0]), int(starts[-1]))
    return F.embedding_bag(
        routing.tokens_M[begin:end],
        source_BD,
        offsets=starts - begin if begin else starts,
        per_sample_weights=routing.weights_M[begin:end],
        mode="sum",
        include_last_offset=True,
    )
