"""The sparse operations of an MxD in training: the gate's product with its exact top-k, and the weighted sum of experts' rows.

Shape suffixes: B tokens, D any width, N experts, K active experts a token, M = B K pairs of a token and an active expert.
`autograd.py` holds the operations with their sparse backward, `reference.py` what they are made of in torch, `kernels.py` the same
in Triton for GPUs.
"""

from mxd_convert.layers.sparse_ops.autograd import RowGradient, sparse_gate, top_k, weighted_rows

__all__ = ["RowGradient", "sparse_gate", "top_k", "weighted_rows"]
