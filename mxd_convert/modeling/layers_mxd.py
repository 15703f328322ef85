# Copyright 2026 The mxd-convert authors. Apache-2.0.
"""The layers: Mixtures of Decoders (MxD, arXiv 2505.21364) and the kinds that they are compared with.

Shape suffixes: B tokens (any leading dimensions), I input width, H hidden width, O output width, N experts, K active experts.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from .configuration_mxd import KINDS

ORDER = ("d_in", "d_hidden", "d_out", "n_experts", "k")  # of the sizes in an entry

Codes = tuple[Tensor, Tensor] | Tensor  # coefficients: (values, indices) of the K active experts, or dense (..., N)


class ExpertActs(nn.Module):
    """Gate values (..., N) -> the coefficients `a = TopK(ReLU(gate))` as (values, indices), (..., K); with "l1", `ReLU(gate)`, (..., N).

    Values of experts that are not positive are 0. A hook may put either form in place of what it returns.
    """

    def __init__(self, k: int, sparsity: str) -> None:
        super().__init__()
        self.k, self.sparsity = k, sparsity

    def forward(self, gate_BN: Tensor) -> Codes:
        if self.sparsity == "l1":
            return F.relu(gate_BN)
        values_BK, indices_BK = gate_BN.topk(self.k, dim=-1, sorted=False)
        return F.relu(values_BK), indices_BK  # the same as top-k of ReLU, without a pass over all N


class Gain(nn.Module):
    """Coefficients -> `C^T a`, (..., O). Adding `s * c_n` to what it returns is adding s to the coefficient of expert n.

    changes: (expert, what its coefficient changes by, (...)) of steered experts.
    """

    def forward(self, codes: Codes, experts_NO: Tensor, changes: Sequence[tuple[int, Tensor]] = ()) -> Tensor:
        gain_BO = codes @ experts_NO.to(codes.dtype) if isinstance(codes, Tensor) else weighted_rows(*codes, experts_NO)
        for expert, change_B in changes:
            gain_BO = gain_BO + change_B.to(gain_BO.dtype).unsqueeze(-1) * experts_NO[expert].to(gain_BO.dtype)
        return gain_BO


# Steering belongs to the thread (or asyncio task) that asks for it: several may steer one model at once, each in its own way.
_steered: ContextVar[Mapping[int, tuple[dict[str, Any], ...]]] = ContextVar(
    "mxd_steered", default=MappingProxyType({})
)  # by id of the layer
_counting = threading.Lock()


@contextmanager
def steering(layers: Sequence[Any], orders: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Within it, this thread steers `layers`, each by those of the orders that name its `index`."""
    thread, outer = threading.get_ident(), _steered.get()
    inner = {id(layer): tuple(order for order in orders if order["layer"] == layer.index) for layer in layers}
    token = _steered.set({**outer, **{key: outer.get(key, ()) + inner[key] for key in inner}})
    with _counting:
        for layer in layers:
            layer.contexts, layer.was_steered = [*layer.contexts, thread], True
    try:
        yield
    finally:
        _steered.reset(token)
        with _counting:
            for layer in layers:
                left = list(layer.contexts)
                left.remove(thread)
                layer.contexts = left


def orders_of(layer: Any) -> list[dict[str, Any]]:
    """The steering of a layer that holds in this thread: the checkpoint's own, then that of the contexts around.

    Raises ValueError in a thread that has none of its own while another one steers: whether it was meant to be steered too is unknown.
    """
    given = _steered.get()
    if layer.contexts and id(layer) not in given and threading.get_ident() not in layer.contexts:
        raise ValueError(
            "the model is steered in another thread, and this one does not say whether it is to be steered: run it within"
            " `with model.steered([]):` for no steering, or start the thread with `contextvars.copy_context().run` to inherit it"
        )
    return [*layer.steering, *given.get(id(layer), ())]


_orders_of = torch.compiler.disable(orders_of)

# position of this thread's forward: its first token, and the tokens of the prompt (None outside of `generate`)
position: ContextVar[tuple[int, int | None]] = ContextVar("mxd_position", default=(0, None))


@torch.compiler.disable
def _is_steered_at(positions: str, tokens: int, device: torch.device) -> Tensor:
    """Which of the forward's tokens are steered, (T) bool. What `generate` did not write is prompt."""
    first, prompt = position.get()
    at_T = first + torch.arange(tokens, device=device)
    written_T = torch.zeros_like(at_T, dtype=torch.bool) if prompt is None else at_T >= prompt
    return written_T if positions == "generation" else ~written_T


class FactoredLayer(nn.Module):
    """What stands in an MLP's place: `y = gain * linear + b`, gain `C^T a` and linear `D^T z`. A kind of layer may have but one of them.

    Attributes: `kind` as in config.json; widths `d_in`, `d_hidden`, `d_out`; `n_experts` and `k` (0 without a gain); `steering`, the
    checkpoint's own, a list of {"expert", "positions", and one of "add", "set", "scale", "ablate"}, applied in order.
    """

    kind: str
    encoder: Any  # a Linear, as the next three, or None
    encoder_gate: Any
    decoder: Any
    gate: Any
    experts: Any  # a Parameter or None

    def __init__(self, d_in: int, d_out: int, skip: bool, dropout: float) -> None:
        super().__init__()
        self.d_in, self.d_hidden, self.d_out, self.n_experts = d_in, 0, d_out, 0
        self.encoder = self.encoder_gate = self.decoder = self.gate = None
        self.register_parameter("experts", None)
        self.skip = nn.Linear(d_in, d_out, bias=False) if skip else None
        self.output_bias = nn.Parameter(torch.empty(d_out))
        self.dropout = nn.Dropout(dropout)
        self.steering: list[dict[str, Any]] = []
        self.index = 0  # of the decoder layer, in a model
        self.contexts: list[int] = []  # threads that steer this layer at this moment
        self.was_steered = False  # a thread that inherited a context may be in it for longer than the one that opened it

    def _add_linear(self, d_hidden: int, activation: str, glu: bool) -> None:
        if activation not in ACT2FN:
            raise ValueError(f"activation {activation!r} is not one that transformers names")
        self.d_hidden, self.activation, self.glu = d_hidden, activation, glu
        self.encoder = nn.Linear(self.d_in, d_hidden)
        self.encoder_gate = nn.Linear(self.d_in, d_hidden) if glu else None
        self.decoder = nn.Linear(d_hidden, self.d_out, bias=False)
        self.act = ACT2FN[activation]

    def _add_gain(self, n_experts: int, k: int, sparsity: str) -> None:
        if not 1 <= k <= n_experts:
            raise ValueError(f"k = {k} active experts of {n_experts}: k must be from 1 to the number of experts")
        if sparsity not in ("topk", "l1"):
            raise ValueError(f"sparsity {sparsity!r} is neither topk nor l1")
        self.n_experts, self.sparsity = n_experts, sparsity
        self.gate = nn.Linear(self.d_in, n_experts)
        self.expert_acts = ExpertActs(k, sparsity)
        self.gain = Gain()
        self.experts = nn.Parameter(torch.empty(n_experts, self.d_out))

    @property
    def k(self) -> int:
        """Active experts per token, 0 in a layer without experts. Kept in `expert_acts`; setting it changes every use."""
        return 0 if self.gate is None else self.expert_acts.k

    @k.setter
    def k(self, k: int) -> None:
        if not 1 <= k <= self.n_experts:
            raise ValueError(f"k = {k} active experts of {self.n_experts}: k must be from 1 to the number of experts")
        self.expert_acts.k = k

    def entry(self) -> dict[str, Any]:
        """Return the layer's entry in `config.mxd["layers"]`, of which `build_layer` makes it again."""
        sizes, defaults = KINDS[self.kind]
        values = {"skip": self.skip is not None, "dropout": self.dropout.p}
        return {
            "kind": self.kind,
            **{key: values.get(key, getattr(self, key)) for key in (*ORDER, *defaults) if key in sizes | defaults.keys()},
        }

    @torch.no_grad()
    def init_rows(self) -> None:
        """Initialise the parameters that belong to no Linear."""
        if self.experts is not None:
            init.normal_(self.experts, std=self.d_out**-0.5)
        init.zeros_(self.output_bias)

    def encode(self, x_BI: Tensor) -> Codes:
        """The coefficients: (values, indices) of shape (..., K), 0 where a gate is not positive; dense (..., N) with `sparsity: l1`."""
        if self.gate is None:
            nobody = x_BI.new_zeros((*x_BI.shape[:-1], 0))
            return nobody, nobody.long()
        return self.expert_acts(self.gate(x_BI))

    def hidden(self, x_BI: Tensor) -> Tensor:
        """The hidden units z, (..., H), of which every expert is a linear map."""
        if self.encoder_gate is not None:
            return self.act(self.encoder_gate(x_BI)) * self.encoder(x_BI)
        return self.act(self.encoder(x_BI))

    def linear(self, x_BI: Tensor) -> Tensor:
        """`u = D^T z`, (..., O); ones in a layer without hidden units."""
        return x_BI.new_ones((*x_BI.shape[:-1], self.d_out)) if self.decoder is None else self.decoder(self.hidden(x_BI))

    def gain_of(self, codes: Codes) -> Tensor:
        """`g = C^T a`, (..., O), from what `encode` returns, steering included; ones in a layer without experts."""
        if self.experts is None:
            return codes[0].new_ones((*codes[0].shape[:-1], self.d_out))
        return self.gain(codes, self.experts, self.changes(codes))

    def combine(self, x_BI: Tensor, codes: Codes) -> Tensor:
        """The layer's output, (..., O), for given coefficients."""
        if self.decoder is None:
            y_BO = self.gain_of(codes) + self.output_bias
        elif self.experts is None:
            y_BO = self.linear(x_BI) + self.output_bias
        else:
            y_BO = self.gain_of(codes) * self.linear(x_BI) + self.output_bias
        return self.dropout(y_BO if self.skip is None else y_BO + self.skip(x_BI))

    def forward(self, x_BI: Tensor) -> Tensor:
        return self.combine(x_BI, self.encode(x_BI))

    def changes(self, codes: Codes) -> list[tuple[int, Tensor]]:
        """By how much steering changes the coefficient of each steered expert, (...), in float32."""
        before: dict[int, Tensor] = {}
        after: dict[int, Tensor] = {}
        inherited = self.was_steered and not torch.compiler.is_compiling()
        for order in _orders_of(self) if self.contexts or inherited else self.steering:
            n = order["expert"]
            if n not in before:
                before[n] = after[n] = coefficient(codes, n).float()
            a = after[n]
            if "add" in order:
                wanted = a + order["add"]
            elif "set" in order:
                wanted = torch.full_like(a, order["set"])
            else:
                wanted = a * order.get("scale", 0.0)  # what is left is "ablate"
            if order.get("positions", "all") != "all":
                wanted = torch.where(_is_steered_at(order["positions"], a.shape[-1], a.device), wanted, a)
            after[n] = wanted
        return [(n, after[n] - before[n]) for n in before]

    def extra_repr(self) -> str:
        return f"kind={self.kind}, n_experts={self.n_experts}, k={self.k}"


class MxD(FactoredLayer):
    """A sparse mixture of N linear experts in place of an MLP: `y = (C^T a) * (D^T z) + b` (paper, section 3).

    Equal to `sum_n a_n W_n^T z` with `W_n = D diag(c_n)` (Lemma 2). `a` are the expert coefficients, `z` the hidden units:
    `z = act(encoder(x))`, or `act(encoder_gate(x)) * encoder(x)` for GLUs.

    Args: widths `d_in` I, `d_hidden` H, `d_out` O; `n_experts` N; `k` active experts a token; `activation` a name of
    transformers' ACT2FN; `sparsity` "topk" (the k largest positive gates) or "l1" (every positive gate, k unused);
    `skip` adds a linear path from input to output; `dropout` is on the output, in training mode, where the base's MLP had it.
    Raises ValueError where they make no layer.
    """

    kind = "mxd"

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
    ) -> None:
        super().__init__(d_in, d_out, skip, dropout)
        self._add_linear(d_hidden, activation, glu)
        self._add_gain(n_experts, k, sparsity)
        self.init_rows()

    @torch.no_grad()
    def expert_weight(self, n: int) -> Tensor:
        """The materialised weight of expert n, `D diag(c_n)`, (H, O). Raises IndexError where there is no such expert."""
        if not 0 <= n < self.n_experts:
            raise IndexError(f"expert {n} of a layer with experts 0 to {self.n_experts - 1}")
        return self.decoder.weight.T * self.experts[n]


class RandomGate(MxD):
    """An MxD whose gate was drawn at random and never trained: the control for what learning the routing is worth."""

    kind = "random_gate"


class Transcoder(FactoredLayer):
    """A sparse transcoder, the usual alternative: `y = C^T a + b`, with rows of C as the decoder.

    Args as for MxD. Raises ValueError where they make no layer.
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


class DenseTwin(FactoredLayer):
    """An MxD whose gain is constant: `y = D^T z + b`, an MLP. What the experts must beat or explain. Args as for MxD."""

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


LAYERS: dict[str, type[FactoredLayer]] = {layer.kind: layer for layer in (MxD, RandomGate, Transcoder, SkipTranscoder, DenseTwin)}


def build_layer(entry: Mapping[str, Any]) -> FactoredLayer:
    """Return the layer of an entry of `config.mxd["layers"]`, newly initialised."""
    return LAYERS[entry["kind"]](**{key: value for key, value in entry.items() if key != "kind"})


def weighted_rows(values_BK: Tensor, indices_BK: Tensor, rows_NO: Tensor) -> Tensor:
    """`sum_k values[..., k] * rows[indices[..., k]]`, (..., O), without a tensor of (B, K, O) or (B, N)."""
    lead, k = values_BK.shape[:-1], values_BK.shape[-1]
    sums = F.embedding_bag(
        indices_BK.reshape(-1, k), rows_NO, per_sample_weights=values_BK.reshape(-1, k).to(rows_NO.dtype), mode="sum"
    )
    return sums.reshape(*lead, rows_NO.shape[-1]).to(values_BK.dtype)


def coefficient(codes: Codes, expert: int) -> Tensor:
    """The coefficient of one expert, (...), 0 where it is not active."""
    if isinstance(codes, Tensor):
        return codes[..., expert]
    return (codes[0] * (codes[1] == expert)).sum(-1)
