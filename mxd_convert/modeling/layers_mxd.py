# Copyright 2026 The mxd-convert authors. Apache-2.0.
"""The layers: Mixtures of Decoders (MxD, arXiv 2505.21364) and the kinds of layers that they are compared with.

Shape suffixes: B tokens (any number of leading dimensions), T tokens of a sequence, I input width, H hidden units, O output
width, N experts, K active experts.
"""

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from .configuration_mxd import KINDS, without_newer
from .steering_mxd import orders_of

ORDER = ("d_in", "d_hidden", "d_out", "n_experts", "k")  # order of the sizes in an entry

Coefficients = (
    tuple[Tensor, Tensor] | Tensor
)  # coefficients: (values, indices) of the active experts, each (..., K); or dense (..., N)


class ExpertActs(nn.Module):
    """Coefficients of the experts, from their gate values (..., N).

    With sparsity "topk", `a = TopK(ReLU(gate))` as (values, indices), each (..., K); values are 0 for experts without a positive
    gate value. With "l1", `a = ReLU(gate)`, (..., N). A forward hook may return coefficients of either form instead.
    """

    def __init__(self, k: int, sparsity: str) -> None:
        super().__init__()
        self.k, self.sparsity = k, sparsity

    def forward(self, gate_BN: Tensor) -> Coefficients:
        """Return the coefficients."""
        if self.sparsity == "l1":
            return F.relu(gate_BN)
        values_BK, indices_BK = gate_BN.topk(self.k, dim=-1, sorted=False)
        return F.relu(values_BK), indices_BK  # equal to TopK(ReLU(gate)), without a pass over all N


class Gain(nn.Module):
    """The gain `C^T a`, (..., O), from the coefficients. Adding `s * c_n` to it adds s to the coefficient of expert n."""

    def forward(self, coefficients: Coefficients, experts_NO: Tensor, changes: Sequence[tuple[int, Tensor]] = ()) -> Tensor:
        """Return the gain. changes: steered experts, each with the change of its coefficient, (...)."""
        gain_BO = (
            coefficients @ experts_NO.to(coefficients.dtype)
            if isinstance(coefficients, Tensor)
            else weighted_rows(*coefficients, experts_NO)
        )
        for expert, change_B in changes:
            gain_BO = gain_BO + change_B.to(gain_BO.dtype).unsqueeze(-1) * experts_NO[expert].to(gain_BO.dtype)
        return gain_BO


_orders_of = torch.compiler.disable(orders_of)

# Position of this thread's forward pass: index of its first token, and number of prompt tokens (None outside of `generate`).
position: ContextVar[tuple[int, int | None]] = ContextVar("mxd_position", default=(0, None))


@torch.compiler.disable
def _is_steered_at(positions: str, tokens: int, device: torch.device) -> Tensor:
    """Return which tokens of the forward pass are steered, (T) bool. All tokens not written by `generate` are prompt tokens."""
    first, prompt = position.get()
    at_T = first + torch.arange(tokens, device=device)
    written_T = torch.zeros_like(at_T, dtype=torch.bool) if prompt is None else at_T >= prompt
    return written_T if positions == "generation" else ~written_T


class FactoredLayer(nn.Module):
    """A layer that replaces an MLP: `y = gain * linear + b`, with gain `C^T a` and linear factor `D^T z`.

    Some kinds of layers have only one of the two, or add them. The row of a shared expert is added to the gain.

    Attributes:
        kind: kind of layer, as in config.json.
        adds: whether `D^T z` is added to the gain instead of multiplying it.
        d_in, d_hidden, d_out: input width, number of hidden units, output width. `d_hidden` is 0 without a linear factor.
        n_experts, k: number of experts, and of active experts per token. Both are 0 without a gain.
        steering: the checkpoint's steering orders, applied in order. Each has "expert", "positions", and one of "add", "set",
            "scale" and "ablate".
        index: index of the decoder layer in the model.
    """

    kind: str
    adds = False
    encoder: Any  # Linear or None
    encoder_gate: Any  # Linear or None
    decoder: Any  # Linear or None
    gate: Any  # Linear or None
    experts: Any  # Parameter or None
    shared_expert: Any  # Parameter or None

    def __init__(self, d_in: int, d_out: int, skip: bool, dropout: float) -> None:
        super().__init__()
        self.d_in, self.d_hidden, self.d_out, self.n_experts = d_in, 0, d_out, 0
        self.encoder = self.encoder_gate = self.decoder = self.gate = None
        self.register_parameter("experts", None)
        self.register_parameter("shared_expert", None)
        self.skip = nn.Linear(d_in, d_out, bias=False) if skip else None
        self.output_bias = nn.Parameter(torch.empty(d_out))
        self.dropout = nn.Dropout(dropout)
        self.steering: list[dict[str, Any]] = []
        self.index = 0
        self.contexts: list[int] = []  # threads that steer this layer now
        self.was_steered = False  # a thread that inherits a context may outlive it, so `contexts` alone is not enough

    def _add_linear(self, d_hidden: int, activation: str, glu: bool) -> None:
        if activation not in ACT2FN:
            raise ValueError(f"activation is {activation!r}; expected an activation of transformers, such as gelu, relu or silu")
        self.d_hidden, self.activation, self.glu = d_hidden, activation, glu
        self.encoder = nn.Linear(self.d_in, d_hidden)
        self.encoder_gate = nn.Linear(self.d_in, d_hidden) if glu else None
        self.decoder = nn.Linear(d_hidden, self.d_out, bias=False)
        self.act = ACT2FN[activation]

    def _add_gain(self, n_experts: int, k: int, sparsity: str) -> None:
        if not 1 <= k <= n_experts:
            raise ValueError(f"k is {k}; expected a number from 1 to {n_experts}, the number of experts")
        if sparsity not in ("topk", "l1"):
            raise ValueError(f"sparsity is {sparsity!r}; expected topk or l1")
        self.n_experts, self.sparsity = n_experts, sparsity
        self.gate = nn.Linear(self.d_in, n_experts)
        self.expert_acts = ExpertActs(k, sparsity)
        self.gain = Gain()
        self.experts = nn.Parameter(torch.empty(n_experts, self.d_out))

    @property
    def k(self) -> int:
        """Return the number of active experts per token, 0 in a layer without experts. It can be set, from 1 to `n_experts`."""
        return 0 if self.gate is None else self.expert_acts.k

    @k.setter
    def k(self, k: int) -> None:
        if not 1 <= k <= self.n_experts:
            raise ValueError(f"k is {k}; expected a number from 1 to {self.n_experts}, the number of experts")
        self.expert_acts.k = k

    def entry(self) -> dict[str, Any]:
        """Return the layer's entry in `config.mxd["layers"]`, from which `build_layer` creates an equal layer."""
        sizes, defaults = KINDS[self.kind]
        values = {"skip": self.skip is not None, "dropout": self.dropout.p, "shared_expert": self.shared_expert is not None}
        keys = [key for key in (*ORDER, *defaults) if key in sizes | defaults.keys()]
        return without_newer({"kind": self.kind, **{key: values.get(key, getattr(self, key)) for key in keys}})

    @torch.no_grad()
    def init_rows(self) -> None:
        """Initialise the parameters outside of Linear modules: experts and output bias."""
        if self.experts is not None:
            init.normal_(self.experts, std=self.d_out**-0.5)
        if self.shared_expert is not None:
            init.zeros_(self.shared_expert)
        init.zeros_(self.output_bias)

    def encode(self, x_BI: Tensor) -> Coefficients:
        """Return the coefficients: (values, indices), each (..., K), 0 if the gate value is not positive; with "l1", (..., N)."""
        if self.gate is None:
            nobody = x_BI.new_zeros((*x_BI.shape[:-1], 0))
            return nobody, nobody.long()
        return self.expert_acts(self.gate(x_BI))

    def hidden(self, x_BI: Tensor) -> Tensor:
        """Return the hidden units z, (..., H), the input of every expert's linear map."""
        if self.encoder_gate is not None:
            return self.act(self.encoder_gate(x_BI)) * self.encoder(x_BI)
        return self.act(self.encoder(x_BI))

    @property
    def is_product(self) -> bool:
        """Return whether the gain is multiplied by a linear factor."""
        return self.experts is not None and self.decoder is not None and not self.adds

    def linear(self, x_BI: Tensor) -> Tensor:
        """Return the linear factor `u = D^T z`, (..., O); ones in a layer without one."""
        if self.decoder is None or self.adds:
            return x_BI.new_ones((*x_BI.shape[:-1], self.d_out))
        return self.decoder(self.hidden(x_BI))

    def dense_path(self, x_BI: Tensor) -> Tensor | None:
        """Return what is added beside gain and linear factor, (..., O): the skip path, and `D^T z` in a layer that adds it."""
        hidden_BO = self.decoder(self.hidden(x_BI)) if self.adds else None
        if self.skip is None:
            return hidden_BO
        return self.skip(x_BI) if hidden_BO is None else hidden_BO + self.skip(x_BI)

    @property
    def has_dense_path(self) -> bool:
        """Return whether anything is added beside gain and linear factor."""
        return self.skip is not None or self.adds

    def gain_of(self, coefficients: Coefficients) -> Tensor:
        """Return the gain `g = C^T a`, (..., O), from the result of `encode`, with steering and shared expert; else ones."""
        if self.experts is None:
            return coefficients[0].new_ones((*coefficients[0].shape[:-1], self.d_out))
        return self._with_shared(self.gain(coefficients, self.experts, self.changes(coefficients)))

    def _with_shared(self, gain_BO: Tensor) -> Tensor:
        """Return the gain with the row of the shared expert, whose coefficient is 1 at every token."""
        return gain_BO if self.shared_expert is None else gain_BO + self.shared_expert.to(gain_BO.dtype)

    def combine(self, x_BI: Tensor, coefficients: Coefficients) -> Tensor:
        """Return the layer's output, (..., O), for given coefficients."""
        return self.join(x_BI, *self.factors(x_BI, coefficients))

    def factors(self, x_BI: Tensor, coefficients: Coefficients) -> tuple[Tensor | None, Tensor | None]:
        """Return gain and linear factor, (..., O) each; None for the one that the layer doesn't have."""
        return (
            None if self.experts is None else self.gain_of(coefficients),
            None if self.decoder is None or self.adds else self.linear(x_BI),
        )

    def join(self, x_BI: Tensor, gain_BO: Tensor | None, linear_BO: Tensor | None) -> Tensor:
        """Return the layer's output, (..., O), for given factors."""
        both = [factor_BO for factor_BO in (gain_BO, linear_BO) if factor_BO is not None]
        y_BO = (both[0] if len(both) == 1 else both[0] * both[1]) + self.output_bias
        dense_BO = self.dense_path(x_BI)
        return self.dropout(y_BO if dense_BO is None else y_BO + dense_BO)

    def forward(self, x_BI: Tensor) -> Tensor:
        """Return the layer's output, (..., O)."""
        return self.combine(x_BI, self.encode(x_BI))

    def changes(self, coefficients: Coefficients) -> list[tuple[int, Tensor]]:
        """Return the steered experts, each with the change of its coefficient, (...), in float32."""
        before: dict[int, Tensor] = {}
        after: dict[int, Tensor] = {}
        inherited = self.was_steered and not torch.compiler.is_compiling()
        for order in _orders_of(self) if self.contexts or inherited else self.steering:
            n = order["expert"]
            if n not in before:
                before[n] = after[n] = coefficient(coefficients, n).float()
            a = after[n]
            if "add" in order:
                wanted = a + order["add"]
            elif "set" in order:
                wanted = torch.full_like(a, order["set"])
            else:
                wanted = a * order.get("scale", 0.0)  # 0 for "ablate"
            if order.get("positions", "all") != "all":
                wanted = torch.where(_is_steered_at(order["positions"], a.shape[-1], a.device), wanted, a)
            after[n] = wanted
        return [(n, after[n] - before[n]) for n in before]

    def extra_repr(self) -> str:
        """Return kind and number of experts, for `repr`."""
        return f"kind={self.kind}, n_experts={self.n_experts}, k={self.k}"


class _LinearAndGain(FactoredLayer):
    """A layer with both hidden units and experts. The arguments are those of MxD."""

    def __init__(
        self,
        d_in: int,
        d_hidden: int,
        d_out: int,
        n_experts: int,
        k: int,
        activation: str = "gelu",
        glu: bool = False,
        sparsity: str = "topk",
        skip: bool = False,
        dropout: float = 0.0,
        shared_expert: bool = False,
    ) -> None:
        super().__init__(d_in, d_out, skip, dropout)
        self._add_linear(d_hidden, activation, glu)
        self._add_gain(n_experts, k, sparsity)
        if shared_expert:
            self.shared_expert = nn.Parameter(torch.empty(d_out))
        self.init_rows()


class MxD(_LinearAndGain):
    """A sparse mixture of N linear experts that replaces an MLP: `y = (C^T a) * (D^T z) + b` (paper, section 3).

    The product equals `sum_n a_n W_n^T z` with `W_n = D diag(c_n)` (Lemma 2). `a` are the coefficients of the experts and `z` the
    hidden units: `z = act(encoder(x))`, or `z = act(encoder_gate(x)) * encoder(x)` for GLUs. A shared expert c_0 has coefficient 1 at
    every token: `y = (c_0 + C^T a) * (D^T z) + b`.

    Args:
        d_in: input width I.
        d_hidden: number of hidden units H.
        d_out: output width O.
        n_experts: number of experts N.
        k: active experts per token.
        activation: name of an activation in transformers' ACT2FN.
        glu: whether the hidden units are those of a GLU.
        sparsity: "topk" (the k largest gate values, where positive) or "l1" (all positive gate values; k is not used).
        skip: whether to add a linear skip path from input to output.
        dropout: dropout on the output in training mode, as in the base's MLP.
        shared_expert: whether to add a shared expert. It is not counted in N and K, and can't be steered.

    Raises:
        ValueError: if the arguments don't describe a layer.
    """

    kind = "mxd"

    @torch.no_grad()
    def expert_weight(self, n: int) -> Tensor:
        """Return the materialised weight of expert n, `D diag(c_n)`, (H, O). Raises IndexError if the layer has no expert n."""
        if not 0 <= n < self.n_experts:
            raise IndexError(f"the layer has no expert {n}. It has experts 0 to {self.n_experts - 1}.")
        return self.decoder.weight.T * self.experts[n]


class RandomGate(MxD):
    """An MxD with a random, untrained gate: the control that measures the benefit of a learned gate."""

    kind = "random_gate"


class Transcoder(FactoredLayer):
    """A sparse transcoder, the usual alternative: `y = C^T a + b`. The rows of C are its decoder.

    The arguments are those of MxD. Raises ValueError if they don't describe a layer.
    """

    kind = "transcoder"
    has_skip = False

    def __init__(self, d_in: int, d_out: int, n_experts: int, k: int, sparsity: str = "topk", dropout: float = 0.0) -> None:
        super().__init__(d_in, d_out, self.has_skip, dropout)
        self._add_gain(n_experts, k, sparsity)
        self.init_rows()


class SkipTranscoder(Transcoder):
    """A transcoder with a linear path from input to output: `y = C^T a + S x + b`."""

    kind = "skip_transcoder"
    has_skip = True


class DenseAssisted(_LinearAndGain):
    """A transcoder beside a narrow MLP: `y = C^T a + D^T z + b`. It is the baseline for the product of an MxD.

    The arguments are those of MxD.
    """

    kind = "dense_assisted"
    adds = True


class DenseTwin(FactoredLayer):
    """An MxD with constant gain, which is an MLP: `y = D^T z + b`. It is the baseline for the experts.

    The arguments are those of MxD.
    """

    kind = "dense_twin"

    def __init__(
        self,
        d_in: int,
        d_hidden: int,
        d_out: int,
        activation: str = "gelu",
        glu: bool = False,
        skip: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(d_in, d_out, skip, dropout)
        self._add_linear(d_hidden, activation, glu)
        self.init_rows()


LAYERS: dict[str, type[FactoredLayer]] = {
    layer.kind: layer for layer in (MxD, RandomGate, Transcoder, SkipTranscoder, DenseAssisted, DenseTwin)
}


def build_layer(entry: Mapping[str, Any]) -> FactoredLayer:
    """Create a freshly initialised layer from an entry of `config.mxd["layers"]`."""
    return LAYERS[entry["kind"]](**{key: value for key, value in entry.items() if key != "kind"})


def weighted_rows(values_BK: Tensor, indices_BK: Tensor, rows_NO: Tensor) -> Tensor:
    """Return `sum_k values[..., k] * rows[indices[..., k]]`, (..., O), without a tensor of shape (B, K, O) or (B, N)."""
    lead, k = values_BK.shape[:-1], values_BK.shape[-1]
    sums = F.embedding_bag(
        indices_BK.reshape(-1, k), rows_NO, per_sample_weights=values_BK.reshape(-1, k).to(rows_NO.dtype), mode="sum"
    )
    return sums.reshape(*lead, rows_NO.shape[-1]).to(values_BK.dtype)


def coefficient(coefficients: Coefficients, expert: int) -> Tensor:
    """Return the coefficient of one expert, (...), which is 0 where the expert is not active."""
    if isinstance(coefficients, Tensor):
        return coefficients[..., expert]
    return (coefficients[0] * (coefficients[1] == expert)).sum(-1)
