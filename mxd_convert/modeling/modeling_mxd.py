# Copyright 2026 The mxd-convert authors. Apache-2.0.
"""Models whose MLPs are Mixtures of Decoders (MxD, arXiv 2505.21364), or one of the layers that these are compared with.

One file serves every architecture: `MxdLlamaForCausalLM` is made, on demand, from transformers' own `LlamaForCausalLM`.
Shape suffixes: B tokens (any leading dimensions), I input width, H hidden width, O output width, N experts, K active experts.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN

from .configuration_mxd import config_class, orders_of, read_steering, steering

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


# Of the thread's own forward and `generate`, since several threads may run one model at once: tokens of the prompt, by id of the model;
# position of the forward's first token, and tokens of the prompt; (B, T) of tokens that a decoder layer flattens.
_prompts: ContextVar[Mapping[int, int]] = ContextVar("mxd_prompts", default=MappingProxyType({}))
_at: ContextVar[tuple[int, int | None]] = ContextVar("mxd_at", default=(0, None))
_lead: ContextVar[torch.Size | None] = ContextVar("mxd_lead", default=None)
_orders_of = torch.compiler.disable(orders_of)


@torch.compiler.disable
def _is_steered_at(positions: str, tokens: int, device: torch.device) -> Tensor:
    """Which of the forward's tokens are steered, (T) bool. What `generate` did not write is prompt."""
    first, prompt = _at.get()
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
        self.d_in, self.d_hidden, self.d_out, self.n_experts, self.k = d_in, 0, d_out, 0, 0
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
        self.n_experts, self.k, self.sparsity = n_experts, k, sparsity
        self.gate = nn.Linear(self.d_in, n_experts)
        self.expert_acts = ExpertActs(k, sparsity)
        self.gain = Gain()
        self.experts = nn.Parameter(torch.empty(n_experts, self.d_out))

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


class Transcoder(FactoredLayer):
    """A sparse transcoder, the usual alternative: `y = C^T a + b`, with rows of C as the decoder and, with `skip`, a linear path beside.

    Args as for MxD. Raises ValueError where they make no layer.
    """

    kind = "transcoder"

    def __init__(
        self, d_in: int, d_out: int, n_experts: int, k: int, sparsity: str = "topk", skip: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__(d_in, d_out, skip, dropout)
        if skip:
            self.kind = "skip_transcoder"
        self._add_gain(n_experts, k, sparsity)
        self.init_rows()


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


def build_layer(entry: Mapping[str, Any]) -> FactoredLayer:
    """The layer of an entry of `config.mxd["layers"]`, its weights still to come."""
    arguments = {key: value for key, value in entry.items() if key != "kind"}
    if entry["kind"] in ("transcoder", "skip_transcoder"):
        return Transcoder(**arguments, skip=entry["kind"] == "skip_transcoder")
    if entry["kind"] == "dense_twin":
        return DenseTwin(**arguments)
    layer = MxD(**arguments)
    layer.kind = entry["kind"]  # mxd, or random_gate, whose gate was not trained
    return layer


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


# --- surgery on transformers' own classes --------------------------------------------------------------------------------------


class MxdModelMixin:
    """Goes before a transformers class: builds it, then puts the layers of `config.mxd` where the MLPs were."""

    base_class: Any  # of transformers, or the base's own code
    _mxd_prefix = ""  # of module paths, which are given as seen from the causal LM

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.mxd is None:
            raise ValueError(f"{type(self).__name__} needs a config with an `mxd` entry")
        for index, entry in config.mxd["layers"].items():
            layer = build_layer(entry)
            layer.index = int(index)
            self._mxd_put(config.mxd["mlp"], index, layer)
            for path in config.mxd.get("then", []):
                self._mxd_put(path, index, nn.Identity())
            if config.mxd.get("flat"):
                self._mxd_put(config.mxd["then"][-1], index, nn.Flatten(0, -2))
                self._unflatten(index, layer)
        self.register_forward_pre_hook(self._note_place, with_kwargs=True)
        self.set_steering(config.mxd.get("steering", []))
        self.post_init()

    @staticmethod
    def _note_place(model: Any, _: Any, arguments: dict[str, Any]) -> None:
        """Before a forward: where in its text it is, for steering that only acts on the prompt, or on what is written."""
        if any(layer.steering or layer.was_steered for layer in model.mxd_layers().values()):
            model._note_position(arguments.get("past_key_values"))

    @torch.compiler.disable
    def _note_position(self, cache: Any) -> None:
        if any(order.get("positions", "all") != "all" for layer in self._mxd_copies() for order in orders_of(layer)):
            _at.set((0 if cache is None else int(cache.get_seq_length()), _prompts.get().get(id(self))))

    @contextmanager
    def steered(self, orders: Sequence[Mapping[str, Any]]) -> Iterator[None]:
        """Steer within it, in this thread (or asyncio task) alone, after the checkpoint's own steering; contexts nest.

        orders: as in `set_steering`; an empty list says that this thread is not steered, while another one is. A thread that is started
        within it inherits nothing, unless it is started with `contextvars.copy_context().run`. Raises ValueError.
        """
        with steering(self._mxd_copies(), read_steering(orders, self.config.mxd["layers"])):
            yield

    def set_steering(self, orders: Sequence[Mapping[str, Any]]) -> None:
        """Steers from now on, also after `save_pretrained` and `from_pretrained`; an empty list ends it.

        orders: mappings with "layer", "expert", one of "add", "set", "scale" (numbers) and "ablate" (true), and "positions": "all"
        (default), "prompt", "generation" (what `generate` writes). Applied in order. Raises ValueError.
        """
        orders = read_steering(orders, self.config.mxd["layers"])
        for layer in self._mxd_copies():
            layer.steering = [order for order in orders if order["layer"] == layer.index]
        self.config.mxd = {key: value for key, value in self.config.mxd.items() if key != "steering"}
        if orders:
            self.config.mxd["steering"] = orders

    def _mxd_path(self, index: int | str) -> str:
        return self.config.mxd["mlp"].format(i=index).removeprefix(self._mxd_prefix)

    def _mxd_put(self, path: str, index: str, module: nn.Module) -> None:
        parent, _, name = path.format(i=index).removeprefix(self._mxd_prefix).rpartition(".")
        setattr(self.get_submodule(parent), name, module)

    def _unflatten(self, index: str, layer: FactoredLayer) -> None:
        """Lets a layer whose decoder layer flattens its tokens see them as (B, T, I); standing elsewhere, it takes them as they come.
        By hooks within the decoder layer's forward, which gradient checkpointing repeats as it does not the decoder layer's own."""
        template, compiled = self.config.mxd["mlp"], _Lead()
        before = f"{template[: template.index('{i}') + 3]}.{self.config.mxd['flat']}"

        def note(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            compiled.put((arguments[0] if arguments else keywords["hidden_states"]).shape[:-1])

        def unflatten(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            [x_BI], lead = arguments, compiled.take()
            return arguments if lead is None else (x_BI.reshape(*lead, x_BI.shape[-1]),)

        self.get_submodule(before.format(i=index).removeprefix(self._mxd_prefix)).register_forward_pre_hook(
            note, with_kwargs=True
        )
        layer.register_forward_pre_hook(unflatten)

    def mxd_layers(self) -> dict[int, FactoredLayer]:
        """The layers that stand in MLPs' places, by layer index, ascending. Of one that PEFT has wrapped, the copy that is in use."""
        found = {int(index): self.get_submodule(self._mxd_path(int(index))) for index in self.config.mxd["layers"]}
        return {index: module if isinstance(module, FactoredLayer) else _in_use(module) for index, module in found.items()}

    def _mxd_copies(self) -> list[FactoredLayer]:
        """Every layer of ours in the model, with those that PEFT has made copies of (`modules_to_save`), and these copies."""
        return [module for module in self.modules() if isinstance(module, FactoredLayer)]

    def initialize_weights(self) -> None:
        """As transformers' own, but our layers first: to a model without head within this one, their rows are unknown."""
        for layer in self._mxd_copies():
            layer.apply(self._initialize_weights)
        super().initialize_weights()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FactoredLayer):
            module.init_rows()

    @classmethod
    def is_custom_code(cls) -> bool:
        """As of the base: transformers initialises fewer modules of a class that it takes for another's code."""
        return bool(cls.base_class.is_custom_code())

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As transformers' own, but a missing or unexpected tensor is an error: a layer made up at random would go unnoticed."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if output_loading_info or (args[0] if args else kwargs.get("pretrained_model_name_or_path")) is None:
            return (model, info) if output_loading_info else model  # it is asked for, or there is no checkpoint
        shapes = () if kwargs.get("ignore_mismatched_sizes") else ("mismatched_keys",)
        for problem in ("missing_keys", "unexpected_keys", *shapes):
            keys = _names(info.get(problem, ()))
            if problem == "unexpected_keys":  # a model without head leaves the heads of its checkpoint aside
                keys = [key for key in keys if key.startswith(cls._mxd_prefix)]
            if keys:
                more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
                raise ValueError(
                    f"the checkpoint's weights don't fit its config.json: {problem.replace('_', ' ')}: {keys[0]}{more}"
                )
        return (model, info) if output_loading_info else model


class MxdGenerationMixin(MxdModelMixin):
    """The same for a causal LM, whose `generate` tells the layers where the prompt ends."""

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own."""
        given = next((ids for ids in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if ids is not None), None)
        token = _prompts.set({**_prompts.get(), id(self): 1 if given is None else given.shape[1]})
        try:
            return super().generate(inputs, *args, **kwargs)
        finally:
            _prompts.reset(token)


class _Lead:
    """(B, T) from one hook to the next within a decoder layer's forward. Compiled, it is a constant of the graph; else the thread's own."""

    traced: torch.Size | None = None

    def put(self, lead: torch.Size) -> None:
        if torch.compiler.is_compiling():
            self.traced = lead
        else:
            _lead.set(lead)

    def take(self) -> torch.Size | None:
        if torch.compiler.is_compiling():
            lead, self.traced = self.traced, None
        else:
            lead = _lead.get()
            _lead.set(None)
        return lead


def _in_use(wrapper: nn.Module) -> FactoredLayer:
    copies = [module for module in wrapper.modules() if isinstance(module, FactoredLayer)]
    return copies[0 if getattr(wrapper, "disable_adapters", False) else -1]


def _names(keys: Any) -> list[str]:
    return sorted(key if isinstance(key, str) else str(key[0]) for key in keys)


def make_model(config: Any, base: Any, auto_class: str, module: str = __name__) -> type[PreTrainedModel]:
    """The MxD counterpart of a model class, for the MxD counterpart of its config. module: where it is said to be defined, which travels with
    the checkpoint."""
    headless = auto_class == "AutoModel"
    members = {
        "__module__": module,
        "__doc__": f"{base.__name__} with MxD layers in place of MLPs.",
        "config_class": config,
        "base_class": base,
        "_auto_class": auto_class,  # save_pretrained then copies this file into the checkpoint
        "_mxd_prefix": f"{base.base_model_prefix}." if headless else "",
    }
    name = config.__name__.removesuffix("Config") + ("Model" if headless else "ForCausalLM")
    return type(name, (MxdModelMixin if headless else MxdGenerationMixin, base), members)


def __getattr__(name: str) -> Any:
    for suffix, mapping in (("ForCausalLM", MODEL_FOR_CAUSAL_LM_MAPPING), ("Model", MODEL_MAPPING)):
        if name.startswith("Mxd") and name.endswith(suffix):
            config = config_class(name[len("Mxd") : -len(suffix)])
            globals()[name] = make_model(config, mapping[config.__mro__[1]], f"Auto{suffix.replace('For', 'ModelFor')}")
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
