"""KL(base || converted) of the next token, computed from hidden states in chunks of tokens.

The logits of a chunk are freed before those of the next are computed, in the forward and in the backward: the forward computes the
gradient of the hidden states too. Shape suffixes: B blocks, T tokens of a block, H hidden width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mxd_convert.base_model.tail import Tail
from mxd_convert.layers.losses import kl_terms

CPU_LOGITS, GPU_LOGITS = 2**24, 2**27  # of a chunk; there are six tensors of this size
MIN_TOKENS = 64  # of a chunk: products of fewer rows are slow


def chunk_tokens(device: str, vocabulary: int) -> int:
    """Return the number of tokens whose logits are computed at once."""
    return max(MIN_TOKENS, (CPU_LOGITS if device == "cpu" else GPU_LOGITS) // vocabulary)


def summed_kl(tail: Tail, base_BTH: Tensor, hidden_BTH: Tensor, counted_BT: Tensor, chunk: int) -> Tensor:
    """Return KL(base || converted) in nats, summed over the tokens that count: a scalar, differentiable in `hidden_BTH`.

    Args:
        tail: of the model, whose parameters get no gradient.
        base_BTH: output of the last decoder layer of the base.
        hidden_BTH: output of the last decoder layer of the converted model.
        counted_BT: which tokens count, bool.
        chunk: most tokens whose logits are computed at once.
    """
    return _SummedKL.apply(hidden_BTH, base_BTH, counted_BT, tail, chunk)  # type: ignore[no-untyped-call]


class _SummedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_BTH: Tensor, base_BTH: Tensor, counted_BT: Tensor, tail: Tail, chunk: int) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        grad_BTH = torch.empty_like(hidden_BTH) if wanted else None
        total = torch.zeros((), device=hidden_BTH.device)
        blocks, context = hidden_BTH.shape[:2]
        rows, columns = max(1, chunk // context), min(chunk, context)
        for row in range(0, blocks, rows):
            for column in range(0, context, columns):
                part = slice(row, row + rows), slice(column, column + columns)
                base_log_probs = tail.logits(base_BTH[part]).float().log_softmax(-1)
                with torch.set_grad_enabled(wanted):
                    hidden = hidden_BTH[part].detach().requires_grad_(wanted)
                    log_probs = tail.logits(hidden).float().log_softmax(-1)
                    kl = (kl_terms(base_log_probs, log_probs).sum(-1) * counted_BT[part]).sum()
                total += kl.detach()
                if grad_BTH is not None:
                    (grad_BTH[part],) = torch.autograd.grad(kl, hidden)
                del base_log_probs, log_probs, kl
        ctx.save_for_backward(grad_BTH)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BTH,) = ctx.saved_tensors
        return grad_BTH * grad, None, None, None, None
