"""The exact decomposition of a layer's output into experts, and each expert's direct effect on the next token's logits.

An expert contributes `a_n (c_n * u)` to a layer's output, with u = D^T z (ones in a transcoder). The contributions, the shared expert,
the output bias and the skip path sum to the output. The direct effect of an expert on the logits bypasses all later layers: its
contribution, multiplied by the final norm's weight and its scale at that token, then by the unembedding.
Shape suffixes: B batch (any leading dimensions), T tokens, K active experts, I input width, O output width, V vocabulary.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mxd_convert.base_model.capture import watching
from mxd_convert.base_model.families import architecture_of
from mxd_convert.base_model.swap import check_converted
from mxd_convert.errors import InputError
from mxd_convert.modeling.layers_mxd import Coefficients, FactoredLayer, MxD

_CHUNK = 256  # contributions whose logits are computed at a time


@dataclass(frozen=True)
class Decomposition:
    """The decomposition of a layer's output at each token.

    values: coefficients, (..., K); 0 means not active. experts: their indices, (..., K). directions: `c_n * u`, the contribution
    of a coefficient of 1, (..., K, O). rest: output bias, dense path and shared expert, (..., O).
    """

    values: Tensor
    experts: Tensor
    directions: Tensor
    rest: Tensor

    @property
    def contributions(self) -> Tensor:
        """Return what each expert adds to the output, (..., K, O)."""
        return self.values.unsqueeze(-1) * self.directions

    @property
    def output(self) -> Tensor:
        """Return the layer's output, (..., O): the sum of the contributions and the rest."""
        return self.contributions.sum(-2) + self.rest


@torch.no_grad()
def decompose_layer(layer: FactoredLayer, x_BI: Tensor) -> Decomposition:
    """Decompose a layer's output for inputs (..., I). Raises InputError if the layer has no experts.

    Steering adds an entry with the change of the coefficient, so that an expert may occur twice at a token.
    """
    if layer.n_experts == 0:
        raise InputError(
            f"a {layer.kind} has no experts, so its output can't be decomposed by expert. Give a layer with experts."
        )
    values_BK, experts_BK = sparse(layer.encode(x_BI))
    for n, change_B in layer.changes((values_BK, experts_BK)):
        values_BK = torch.cat([values_BK, change_B.to(values_BK.dtype).unsqueeze(-1)], -1)
        experts_BK = torch.cat([experts_BK, torch.full_like(experts_BK[..., :1], n)], -1)
    directions = layer.experts[experts_BK].to(values_BK.dtype)
    rest_BO = layer.output_bias.expand(*x_BI.shape[:-1], -1)
    if layer.is_product:
        linear_BO = layer.linear(x_BI)
        directions = directions * linear_BO.unsqueeze(-2)
        if layer.shared_expert is not None:
            rest_BO = rest_BO + layer.shared_expert * linear_BO
    dense_BO = layer.dense_path(x_BI)
    return Decomposition(values_BK, experts_BK, directions, rest_BO if dense_BO is None else rest_BO + dense_BO)


def sparse(coefficients: Coefficients) -> tuple[Tensor, Tensor]:
    """Return coefficients as (values, indices), (..., K). For dense ones, K is the largest number active at any token."""
    if not isinstance(coefficients, Tensor):
        return coefficients
    most = max(1, int((coefficients > 0).sum(-1).max()))
    values, indices = coefficients.topk(most, dim=-1)
    return values, indices


@torch.no_grad()
def decompose(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[int, Decomposition]:
    """Decompose the output of every layer with experts on token ids (B, T). Return the parts, (B, T, ...), by layer index."""
    layers = {index: layer for index, layer in model.mxd_layers().items() if layer.n_experts}
    with watching(layers) as seen:
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return {index: decompose_layer(layer, seen[index].inputs) for index, layer in layers.items()}


@dataclass(frozen=True)
class Norm:
    """A norm as the linear map that it is at a fixed scale: `weight * x`, or `weight * (x - mean(x))` for a centred norm."""

    module: nn.Module
    epsilon: float
    weight_O: Tensor
    centred: bool

    @classmethod
    def of(cls, module: nn.Module, width: int, name: str) -> "Norm":
        """Return the norm that a module computes on inputs of `width`. name: of the module, for messages.

        The weight is measured by calling the module, because families store it differently (Gemma stores weight - 1).
        Raises InputError if the module has no epsilon, so isn't a norm.
        """
        epsilon = next((getattr(module, key) for key in ("variance_epsilon", "eps") if hasattr(module, key)), None)
        if epsilon is None:
            raise InputError(
                f"{name} is a {type(module).__name__}; expected a norm with an epsilon, such as LayerNorm or RMSNorm."
            )
        x_O = torch.ones(width)  # mean 0, no element 0
        x_O[1::2] = -1
        if width % 2:
            x_O[:3] = torch.tensor([1.0, 1.0, -2.0])
        plain = copy.deepcopy(module).cpu().float()
        ahead, back, moved = (plain(x).detach() for x in (x_O, -x_O, x_O + 1))
        centred = torch.allclose(moved, ahead, atol=1e-5 * ahead.abs().max().item())
        weight_O = (ahead - back) / 2 / x_O * (x_O.square().mean() + float(epsilon)).sqrt()
        device = next(iter(module.parameters())).device if list(module.parameters()) else "cpu"
        return cls(module, float(epsilon), weight_O.to(device), centred)

    def scale(self, x_BTO: Tensor) -> Tensor:
        """Return the norm's scale at each token, (B, T): its factor besides the weight."""
        x_BTO = x_BTO.detach().float()
        spread = x_BTO.var(-1, correction=0) if self.centred else x_BTO.square().mean(-1)
        return (spread + self.epsilon).rsqrt()


class Scales:
    """The scales of the norms after a layer's output, at each token of the latest forward, (B, T)."""

    def __init__(self) -> None:
        self.final = torch.zeros(0)
        self.after: dict[int, Tensor] = {}

    def of(self, index: int) -> Tensor:
        """Return the product of the scales that apply to a layer's output, (B, T)."""
        return self.final * self.after[index] if index in self.after else self.final


@dataclass(frozen=True)
class Unembedding:
    """The linear map from a layer's output to logits, at the norms' scales of each token.

    It consists of the family's factor and norm between layer and residual stream, the final norm, and the unembedding. A family's
    cap on logits is not applied.

    norm: the final one. matrix_VO: unembedding times the final norm's weight. after: by layer index, the norm between a layer's
    output and the stream. outlet_O: by layer index, the factor between them.
    """

    norm: Norm
    matrix_VO: Tensor
    after: dict[int, Norm]
    outlet_O: dict[int, Tensor]

    @classmethod
    def of(cls, model: Any) -> "Unembedding":
        """Return the unembedding of a converted model. Raises InputError if the model's final norm or head isn't known."""
        text, row = model.config.get_text_config(), architecture_of(model.config)
        head_VO: Tensor = model.get_output_embeddings().weight.detach().float()
        last = _found(model, row.norm)
        if last is None or head_VO.shape[1] != text.hidden_size:
            named = ". Name the norm in base.mlp.norm." if row.norm is None else ""
            raise InputError(
                f"the effect of experts on the logits is unknown: this model has no norm and head after its layers{named}"
            )
        norm = Norm.of(last, text.hidden_size, str(row.norm))
        factor = getattr(text, "logit_scale", 1.0) / getattr(text, "logits_scaling", 1.0)
        matrix_VO = head_VO * norm.weight_O.to(head_VO.device) * factor
        if norm.centred:  # the norm subtracts the mean of its input at every token
            matrix_VO = matrix_VO - matrix_VO.mean(-1, keepdim=True)
        multiplier = float(getattr(text, row.scale)) if row.scale is not None else 1.0
        after: dict[int, Norm] = {}
        outlet_O: dict[int, Tensor] = {}
        for index, layer in model.mxd_layers().items():
            outlet_O[index] = torch.full((layer.d_out,), multiplier, device=head_VO.device)
            if row.after is not None:
                path = f"{row.layer.format(i=index)}.{row.after}"
                after[index] = Norm.of(model.get_submodule(path), layer.d_out, path)
                outlet_O[index] = multiplier * after[index].weight_O.to(head_VO.device)
        return cls(norm, matrix_VO, after, outlet_O)

    @contextmanager
    def scales(self) -> Iterator[Scales]:
        """Yield the Scales that every forward within the context updates."""
        seen = Scales()

        def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen.final = self.norm.scale(arguments[0])

        def note_after(index: int) -> Any:
            return lambda module, arguments: seen.after.__setitem__(index, self.after[index].scale(arguments[0]))

        handles = [self.norm.module.register_forward_pre_hook(note)]
        handles += [norm.module.register_forward_pre_hook(note_after(index)) for index, norm in self.after.items()]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def logits(self, scaled_BO: Tensor) -> Tensor:
        """Return logits (..., V) of outputs that are already multiplied by the norms' scales and `outlet_O`.

        They are centred over the vocabulary, because a constant changes no probability.
        """
        logits_BV = scaled_BO.float() @ self.matrix_VO.T
        return logits_BV - logits_BV.mean(-1, keepdim=True)


def _found(model: nn.Module, path: str | None) -> nn.Module | None:
    try:
        return model.get_submodule(path) if path else None
    except AttributeError:
        return None


@dataclass(frozen=True)
class LogitEffect:
    """An expert's direct effect on the next token's logits.

    tokens: number of tokens on which it fires. mean, spread: mean and standard deviation over these tokens, (V).
    """

    tokens: int
    mean: Tensor
    spread: Tensor

    def promoted(self, count: int = 10) -> list[int]:
        """Return the tokens whose logits it raises most, the largest effect first."""
        return [int(index) for index in self.mean.topk(min(count, len(self.mean))).indices]

    def suppressed(self, count: int = 10) -> list[int]:
        """Return the tokens whose logits it lowers most, the largest effect first."""
        return [int(index) for index in (-self.mean).topk(min(count, len(self.mean))).indices]


@torch.no_grad()
def logit_effect(model: Any, layer: int, expert: int, input_ids: Tensor, rows: int = 16) -> LogitEffect:
    """Measure the direct effect of an expert on the next token's logits, centred over the vocabulary.

    Args:
        model: a converted model.
        layer: index of the layer.
        expert: index of the expert.
        input_ids: token ids, (B, T).
        rows: sequences per forward.

    Returns:
        Mean and spread over the tokens where the expert fires; zeros if it never fires.

    Raises:
        InputError: the model has no such expert, or its norm or head isn't known.
    """
    layers = model.mxd_layers()
    check_converted(layer, layers)
    if not 0 <= expert < layers[layer].n_experts:
        raise InputError(f"layer {layer} has no expert {expert}. It has experts 0 to {layers[layer].n_experts - 1}.")
    unembedding = Unembedding.of(model)
    tokens, sums, squares = 0, torch.zeros(()), torch.zeros(())
    for ids_BT in input_ids.split(rows):
        with watching({layer: layers[layer]}) as seen, unembedding.scales() as scales:
            model(input_ids=ids_BT, use_cache=False)
        parts = decompose_layer(layers[layer], seen[layer].inputs)
        fires = (parts.experts == expert) & (parts.values > 0)
        written = (parts.contributions.float() * unembedding.outlet_O[layer] * scales.of(layer)[..., None, None])[fires]
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
    """Return the rank of an expert's materialised weight `D diag(c_n)`. Raises IndexError.

    It is the rank of D without the outputs where c_n is 0.
    """
    return int(torch.linalg.matrix_rank(layer.expert_weight(expert).double()))
