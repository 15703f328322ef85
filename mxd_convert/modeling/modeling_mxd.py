# Copyright 2026 The mxd-convert authors. Apache-2.0.
"""Models whose MLPs are Mixtures of Decoders (MxD, arXiv 2505.21364).

One file serves every architecture: `MxdLlamaForCausalLM` is made, on demand, from transformers' own `LlamaForCausalLM`.
Shape suffixes: B tokens (any leading dimensions), I input width, H hidden width, O output width, N experts, K active experts.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN

from .configuration_mxd import config_class


class MxD(nn.Module):
    """A sparse mixture of N linear experts in place of an MLP: `y = (C^T a) * (D^T z) + b` (paper, section 3).

    Equal to `sum_n a_n W_n^T z` with `W_n = D diag(c_n)` (Lemma 2). `a` are the expert coefficients, `z` the hidden units:
    `z = act(encoder(x))`, or `act(encoder_gate(x)) * encoder(x)` for GLUs.

    Args: widths `d_in` I, `d_hidden` H, `d_out` O; `n_experts` N; `k` active experts a token; `activation` a name of
    transformers' ACT2FN; `sparsity` "topk" (the k largest positive gates) or "l1" (every positive gate, k unused);
    `skip` adds a linear path from input to output; `dropout` is on the output, in training mode, where the base's MLP had it.
    Raises ValueError where they make no layer.
    """

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
        super().__init__()
        if not 1 <= k <= n_experts:
            raise ValueError(f"k = {k} active experts of {n_experts}: k must be from 1 to the number of experts")
        if activation not in ACT2FN:
            raise ValueError(f"activation {activation!r} is not one that transformers names")
        if sparsity not in ("topk", "l1"):
            raise ValueError(f"sparsity {sparsity!r} is neither topk nor l1")
        self.d_in, self.d_hidden, self.d_out, self.n_experts, self.k = d_in, d_hidden, d_out, n_experts, k
        self.activation, self.glu, self.sparsity = activation, glu, sparsity
        self.encoder = nn.Linear(d_in, d_hidden)
        self.encoder_gate = nn.Linear(d_in, d_hidden) if glu else None
        self.decoder = nn.Linear(d_hidden, d_out, bias=False)
        self.gate = nn.Linear(d_in, n_experts)
        self.skip = nn.Linear(d_in, d_out, bias=False) if skip else None
        self.experts = nn.Parameter(torch.empty(n_experts, d_out))
        self.output_bias = nn.Parameter(torch.empty(d_out))
        self.act = ACT2FN[activation]
        self.dropout = nn.Dropout(dropout)
        self.steering: dict[int, float] = {}  # expert -> amount added to its coefficient at every position

    def encode(self, x_BI: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        """The coefficients: (values, indices) of shape (..., K), 0 where a gate is not positive; dense (..., N) with `sparsity: l1`."""
        gate_BN = self.gate(x_BI)
        if self.sparsity == "l1":
            return F.relu(gate_BN)
        values_BK, indices_BK = gate_BN.topk(self.k, dim=-1, sorted=False)
        return F.relu(values_BK), indices_BK  # the same as top-k of ReLU, without a pass over all N

    def hidden(self, x_BI: Tensor) -> Tensor:
        """The hidden units z, (..., H), of which every expert is a linear map."""
        if self.encoder_gate is not None:
            return self.act(self.encoder_gate(x_BI)) * self.encoder(x_BI)
        return self.act(self.encoder(x_BI))

    def gain(self, codes: tuple[Tensor, Tensor] | Tensor) -> Tensor:
        """`C^T a`, (..., O), from what `encode` returns, steering included."""
        if isinstance(codes, Tensor):
            gain_BO = codes @ self.experts.to(codes.dtype)
        else:
            gain_BO = self.rows(*codes)
        for expert, amount in self.steering.items():
            gain_BO = gain_BO + amount * self.experts[expert].to(gain_BO.dtype)
        return gain_BO

    def rows(self, values_BK: Tensor, indices_BK: Tensor) -> Tensor:
        """The sum of the experts' rows, (..., O), each times its coefficient."""
        return weighted_rows(values_BK, indices_BK, self.experts)

    def combine(self, x_BI: Tensor, codes: tuple[Tensor, Tensor] | Tensor) -> Tensor:
        """The layer's output, (..., O), for given coefficients."""
        y_BO = self.gain(codes) * self.decoder(self.hidden(x_BI)) + self.output_bias
        return self.dropout(y_BO if self.skip is None else y_BO + self.skip(x_BI))

    def forward(self, x_BI: Tensor) -> Tensor:
        return self.combine(x_BI, self.encode(x_BI))

    @torch.no_grad()
    def expert_weight(self, n: int) -> Tensor:
        """The materialised weight of expert n, `D diag(c_n)`, (H, O). Raises IndexError where there is no such expert."""
        if not 0 <= n < self.n_experts:
            raise IndexError(f"expert {n} of a layer with experts 0 to {self.n_experts - 1}")
        return self.decoder.weight.T * self.experts[n]

    def extra_repr(self) -> str:
        return f"n_experts={self.n_experts}, k={self.k}, activation={self.activation}, glu={self.glu}, sparsity={self.sparsity}"


def weighted_rows(values_BK: Tensor, indices_BK: Tensor, rows_NO: Tensor) -> Tensor:
    """`sum_k values[..., k] * rows[indices[..., k]]`, (..., O), without a tensor of (B, K, O) or (B, N)."""
    lead, k = values_BK.shape[:-1], values_BK.shape[-1]
    sums = F.embedding_bag(
        indices_BK.reshape(-1, k), rows_NO, per_sample_weights=values_BK.reshape(-1, k).to(rows_NO.dtype), mode="sum"
    )
    return sums.reshape(*lead, rows_NO.shape[-1]).to(values_BK.dtype)


# --- surgery on transformers' own classes --------------------------------------------------------------------------------------


class MxdModelMixin:
    """Goes before a transformers class: builds it, then puts the MxD layers of `config.mxd` where the MLPs were."""

    _mxd_prefix = ""  # of module paths, which are given as seen from the causal LM

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.mxd is None:
            raise ValueError(f"{type(self).__name__} needs a config with an `mxd` entry")
        for index, layer in config.mxd["layers"].items():
            parent, _, name = self._mxd_path(int(index)).rpartition(".")
            setattr(self.get_submodule(parent), name, MxD(**{key: value for key, value in layer.items() if key != "kind"}))
        self.post_init()

    def _mxd_path(self, index: int) -> str:
        return self.config.mxd["mlp"].format(i=index).removeprefix(self._mxd_prefix)

    def mxd_layers(self) -> dict[int, MxD]:
        """The MxD layers by layer index, ascending."""
        return {int(index): self.get_submodule(self._mxd_path(int(index))) for index in self.config.mxd["layers"]}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MxD):  # its raw parameters; the Linears are initialised like the base's own
            init.normal_(module.experts, std=module.d_out**-0.5)
            init.zeros_(module.output_bias)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As transformers' own, but a missing or unexpected tensor is an error: a layer made up at random would go unnoticed."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for problem in (
            "missing_keys",
            "unexpected_keys",
            *(() if kwargs.get("ignore_mismatched_sizes") else ("mismatched_keys",)),
        ):
            keys = _names(info.get(problem, ()))
            if problem == "unexpected_keys":  # a model without head leaves the heads of its checkpoint aside
                keys = [key for key in keys if key.startswith(cls._mxd_prefix)]
            if keys:
                more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
                raise ValueError(
                    f"the checkpoint's weights don't fit its config.json: {problem.replace('_', ' ')}: {keys[0]}{more}"
                )
        return (model, info) if output_loading_info else model


def _names(keys: Any) -> list[str]:
    return sorted(key if isinstance(key, str) else str(key[0]) for key in keys)


def _build(name: str, stem: str, mapping: Mapping[Any, Any], auto_class: str) -> type[PreTrainedModel]:
    config = config_class(stem)
    base = mapping[config.__mro__[1]]
    members = {
        "__module__": __name__,
        "__doc__": f"{base.__name__} with MxD layers in place of MLPs.",
        "config_class": config,
        "_auto_class": auto_class,  # save_pretrained then copies this file into the checkpoint
        "_mxd_prefix": "" if auto_class == "AutoModelForCausalLM" else f"{base.base_model_prefix}.",
    }
    globals()[name] = type(name, (MxdModelMixin, base), members)
    return globals()[name]


def __getattr__(name: str) -> Any:
    if name.startswith("Mxd") and name.endswith("ForCausalLM"):
        return _build(name, name[len("Mxd") : -len("ForCausalLM")], MODEL_FOR_CAUSAL_LM_MAPPING, "AutoModelForCausalLM")
    if name.startswith("Mxd") and name.endswith("Model"):
        return _build(name, name[len("Mxd") : -len("Model")], MODEL_MAPPING, "AutoModel")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
