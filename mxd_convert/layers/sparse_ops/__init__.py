"""Sparse operations for training: gate product with exact top-k, and weighted sum of expert rows.

Shape suffixes: B tokens, D any width, N experts, K active experts per token, M = B K pairs of a token and an active expert.
`autograd.py` has the operations with their sparse backward passes. `reference.py` has their primitives in torch,
`kernels.py` the same primitives in Triton for GPUs.
"""

from mxd_convert.layers.sparse_ops.autograd import RowGradient, sparse_gate, top_k, weighted_rows

__all__ = ["RowGradient", "sparse_gate", "top_k", "weighted_rows"]
