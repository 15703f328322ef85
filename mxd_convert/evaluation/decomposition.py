"""The exact decomposition: what every active expert adds to the residual stream, and what that does to the next token's logits.

An expert's part of a layer's output is `a_n (c_n * u)`, u = D^T z (ones in a transcoder); the parts, the output bias and the skip path
add up to the output. Its direct effect on the logits is that part, through the final norm with the scale that it has there, times the
unembedding: what it writes for the next token past all layers above.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mxd_convert.architectures import ARCHITECTURES
from mxd_convert.errors import InputError
from mxd_convert.harvest import watching
from mxd_convert.modeling.modeling_mxd import Codes, FactoredLayer, MxD

_CHUNK = 256  # tokens whose logits are made at a time


@dataclass(frozen=True)
class Parts:
    """A layer's output taken apart, for each token (...): K active experts, O output width. Coefficients of 0 are not active.

    values, experts: (..., K). directions: `c_n * u`, (..., K, O), what a coefficient of 1 adds. rest: bias and skip path, (..., O).
    """

    values: Tensor
    experts: Tensor
    directions: Tensor
    rest: Tensor

    @property
    def contributions(self) -> Tensor:
        """What each expert adds to the output, (..., K, O)."""
        return self.values.unsqueeze(-1) * self.directions

    @property
    def output(self) -> Tensor:
        """Their sum and the rest, (..., O): the layer's output."""
        return self.contributions.sum(-2) + self.rest


@torch.no_grad()
def take_apart(layer: FactoredLayer, x_BI: Tensor) -> Parts:
    """The parts of a layer's output for inputs (..., I), steering included (as coefficients of their own). Raises InputError without experts."""
    if layer.n_experts == 0:
        raise InputError(f"a {layer.kind} has no experts to take its output apart by")
    values_BK, experts_BK = sparse(layer.encode(x_BI))
    for n, change_B in layer.changes((values_BK, experts_BK)):
        values_BK = torch.cat([values_BK, change_B.to(values_BK.dtype).unsqueeze(-1)], -1)
        experts_BK = torch.cat([experts_BK, torch.full_like(experts_BK[..., :1], n)], -1)
    directions = layer.experts[experts_BK].to(values_BK.dtype)
    if layer.decoder is not None:
        directions = directions * layer.linear(x_BI).unsqueeze(-2)
    rest_BO = layer.output_bias.expand(*x_BI.shape[:-1], -1)
    return Parts(values_BK, experts_BK, directions, rest_BO if layer.skip is None else rest_BO + layer.skip(x_BI))


def sparse(codes: Codes) -> tuple[Tensor, Tensor]:
    """Coefficients as (values, indices), (..., K); of dense ones, with K the most that are active for any token."""
    if not isinstance(codes, Tensor):
        return codes
    most = max(1, int((codes > 0).sum(-1).max()))
    values, indices = codes.topk(most, dim=-1)
    return values, indices


@torch.no_grad()
def decompose(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[int, Parts]:
    """For given tokens (B, T), the parts of every layer that has experts, by layer index: (B, T, K) and (B, T, K, O)."""
    layers = {index: layer for index, layer in model.mxd_layers().items() if layer.n_experts}
    with watching(layers) as seen:
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return {index: take_apart(layer, seen[index].inputs) for index, layer in layers.items()}


class Unembedding:
    """From what is added to the residual stream to logits: the final norm, its scale as it is at the token, and the unembedding."""

    def __init__(self, model: Any) -> None:
        row = ARCHITECTURES[model.config.model_type.removeprefix("mxd_")]
        self.norm = model.get_submodule(row.norm)
        self.centred = isinstance(self.norm, nn.LayerNorm)
        weight: Tensor = self.norm.weight.detach().float()
        self.matrix_VO = model.get_output_embeddings().weight.detach().float() * weight
        if self.centred:  # the norm takes the mean out of what is written, whatever the token
            self.matrix_VO = self.matrix_VO - self.matrix_VO.mean(-1, keepdim=True)

    @contextmanager
    def scales(self) -> Iterator[list[Tensor]]:
        """Within it, every forward leaves the norm's scale at each token, (B, T), in the yielded list."""
        seen: list[Tensor] = []

        def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].detach().float()
            spread = x.var(-1, correction=0) if self.centred else x.square().mean(-1)
            seen.append((spread + _epsilon(self.norm)).rsqrt())

        handle = self.norm.register_forward_pre_hook(note)
        try:
            yield seen
        finally:
            handle.remove()

    def logits(self, scaled_BO: Tensor) -> Tensor:
        """(..., V), centred over the vocabulary (a constant changes no probability). scaled: what is written, times the norm's scale."""
        logits_BV = scaled_BO.float() @ self.matrix_VO.T
        return logits_BV - logits_BV.mean(-1, keepdim=True)


def _epsilon(norm: nn.Module) -> float:
    return float(next(getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name)))


@dataclass(frozen=True)
class LogitEffect:
    """An expert's direct effect on the logits of the next token, over the tokens where it fires: mean and standard deviation, (V)."""

    tokens: int
    mean: Tensor
    spread: Tensor

    def promoted(self, count: int = 10) -> list[int]:
        """The tokens whose logits it raises most."""
        return [int(index) for index in self.mean.topk(min(count, len(self.mean))).indices]

    def suppressed(self, count: int = 10) -> list[int]:
        """The tokens whose logits it lowers most."""
        return [int(index) for index in (-self.mean).topk(min(count, len(self.mean))).indices]


@torch.no_grad()
def logit_effect(model: Any, layer: int, expert: int, input_ids: Tensor, rows: int = 16) -> LogitEffect:
    """The direct effect of an expert of a converted model over token ids (B, T), `rows` of them at a time; zeros where it never fires.

    Logits are centred over the vocabulary. Raises InputError where there is no such expert.
    """
    layers = model.mxd_layers()
    if layer not in layers:
        raise InputError(f"layer {layer} is not converted; converted are {', '.join(map(str, layers))}")
    if not 0 <= expert < layers[layer].n_experts:
        raise InputError(f"layer {layer} has experts 0 to {layers[layer].n_experts - 1}; there is no expert {expert}")
    unembedding = Unembedding(model)
    tokens, sums, squares = 0, torch.zeros(()), torch.zeros(())
    for ids_BT in input_ids.split(rows):
        with watching({layer: layers[layer]}) as seen, unembedding.scales() as scales:
            model(input_ids=ids_BT, use_cache=False)
        parts = take_apart(layers[layer], seen[layer].inputs)
        fires = (parts.experts == expert) & (parts.values > 0)
        written = (parts.contributions.float() * scales[-1][..., None, None])[fires]
        for chunk in written.split(_CHUNK):
            logits = unembedding.logits(chunk).double()
            tokens, sums, squares = tokens + len(chunk), sums + logits.sum(0), squares + logits.square().sum(0)
    if tokens == 0:
        nothing = torch.zeros(len(unembedding.matrix_VO))
        return LogitEffect(0, nothing, nothing)
    mean = sums / tokens
    return LogitEffect(tokens, mean.float(), (squares / tokens - mean.square()).clamp_min(0).sqrt().float())


@torch.no_grad()
def expert_rank(layer: MxD, expert: int) -> int:
    """The rank of an expert's materialised weight, `D diag(c_n)`: that of D, but for outputs where c_n is 0. Raises IndexError."""
    return int(torch.linalg.matrix_rank(layer.expert_weight(expert).double()))
