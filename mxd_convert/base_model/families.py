"""ONE table: model_type -> where the MLP sits, its projections, activation, GLU or not. A new family is a new row (docs/add-a-family.md)."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.activations import ACT2FN
from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mxd_convert.base_model.detect import guess, suggestion, widths_of
from mxd_convert.errors import InputError
from mxd_convert.recipe.schema import Mlp


@dataclass(frozen=True)
class Architecture:
    """How a family of causal LMs holds its MLPs. `{i}` is the layer's index; projections are paths within the module `mlp`.

    Where the MLP is no module of its own, or one that does more (adds the residual), `chain` names the modules within `mlp` that it
    consists of, in the order in which they run: the layer takes the place of the first, and what it returns passes the others unchanged.
    """

    mlp: str
    up: str
    down: str
    activation: str  # the config's key that names the activation, or the activation itself where it has none
    norm: str | None = None  # the last one, before the head
    gate: str | None = None  # the activated projection of a GLU; the same as `up`: both in one matrix, the gate's half first
    chain: tuple[str, ...] = ()
    flat: str | None = None  # a module that still sees (B, T), in a decoder layer that then flattens its tokens to one row
    after: str | None = None  # norm, within the decoder layer, between the MLP's output and the residual stream
    scale: str | None = None  # the config's key of what that output is multiplied by
    dropout: str | None = None  # the config's key of the dropout on the MLP's output, where the MLP itself applies it

    @property
    def layer(self) -> str:
        """The path of a whole decoder layer."""
        return self.mlp[: self.mlp.index("{i}") + len("{i}")]

    @property
    def place(self) -> str:
        """The path of what a converted layer takes the place of."""
        return f"{self.mlp}.{self.chain[0]}" if self.chain else self.mlp

    def words(self, activation: str) -> str:
        """What was found, for people: `model.layers.{i}.mlp: up_proj, silu(gate_proj) > down_proj`."""
        halves = f"{activation} of the first half of {self.up} times the second"
        up = f"{activation}({self.up})" if self.gate is None else f"{activation}({self.gate}) * {self.up}"
        chain = f" (of {', '.join(self.chain)})" if self.chain else ""
        return f"{self.mlp}: {halves if self.gate == self.up else up} > {self.down}{chain}"

    @property
    def then(self) -> tuple[str, ...]:
        """The paths of what its output passes unchanged."""
        return tuple(f"{self.mlp}.{name}" for name in self.chain[1:])


def _glu(
    mlp: str = "model.layers.{i}.mlp", norm: str = "model.norm", activation: str = "hidden_act", **more: Any
) -> Architecture:
    """What most families since Llama have."""
    return Architecture(mlp, "up_proj", "down_proj", activation, norm, gate="gate_proj", **more)


ARCHITECTURES: dict[str, Architecture] = {
    "bloom": Architecture(
        "transformer.h.{i}.mlp",
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        activation="gelu_pytorch_tanh",  # its own module, the same function
        norm="transformer.ln_f",
        chain=("dense_h_to_4h", "gelu_impl", "dense_4h_to_h"),  # the module itself adds the residual
    ),
    "cohere": _glu(),
    "falcon": Architecture(
        "transformer.h.{i}.mlp", up="dense_h_to_4h", down="dense_4h_to_h", activation="activation", norm="transformer.ln_f"
    ),
    "gemma": _glu(),
    "gemma2": _glu(activation="hidden_activation", after="post_feedforward_layernorm"),
    "gemma3_text": _glu(activation="hidden_activation", after="post_feedforward_layernorm"),
    "gpt2": Architecture(
        "transformer.h.{i}.mlp",
        up="c_fc",
        down="c_proj",
        activation="activation_function",
        norm="transformer.ln_f",
        dropout="resid_pdrop",
    ),
    "gpt_neo": Architecture(
        "transformer.h.{i}.mlp",
        up="c_fc",
        down="c_proj",
        activation="activation_function",
        norm="transformer.ln_f",
        dropout="resid_dropout",
    ),
    "gpt_neox": Architecture(
        "gpt_neox.layers.{i}.mlp",
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        activation="hidden_act",
        norm="gpt_neox.final_layer_norm",
    ),
    "gptj": Architecture(
        "transformer.h.{i}.mlp",
        up="fc_in",
        down="fc_out",
        activation="activation_function",
        norm="transformer.ln_f",
        dropout="resid_pdrop",
    ),
    "granite": _glu(scale="residual_multiplier"),
    "llama": _glu(),
    "mistral": _glu(),
    "olmo2": _glu(after="post_feedforward_layernorm"),
    "opt": Architecture(
        "model.decoder.layers.{i}",
        up="fc1",
        down="fc2",
        activation="activation_function",
        norm="model.decoder.final_layer_norm",
        chain=("fc1", "activation_fn", "fc2"),
        flat="self_attn",
    ),
    "phi": Architecture("model.layers.{i}.mlp", up="fc1", down="fc2", activation="hidden_act", norm="model.final_layernorm"),
    "phi3": Architecture(
        "model.layers.{i}.mlp",
        up="gate_up_proj",
        down="down_proj",
        activation="hidden_act",
        norm="model.norm",
        gate="gate_up_proj",
    ),
    "qwen2": _glu(),
    "qwen3": _glu(),
    "smollm3": _glu(),
    "stablelm": _glu(),
    "starcoder2": Architecture(
        "model.layers.{i}.mlp",
        up="c_fc",
        down="c_proj",
        activation="hidden_act",
        norm="model.norm",
        dropout="residual_dropout",
    ),
}


@dataclass(frozen=True)
class Site:
    """One MLP of a model: where it is and what it computes. Widths in features.

    path: the module whose place a layer takes. then: modules that its output passes unchanged, the rest of an MLP that is no module of its
    own. hidden: the module whose input are the hidden units. layer: the decoder layer.
    """

    index: int
    path: str
    d_in: int
    d_hidden: int
    d_out: int
    activation: str
    glu: bool
    then: tuple[str, ...] = ()
    hidden: str = ""
    layer: str = ""

    @property
    def modules(self) -> tuple[str, ...]:
        """Everything that the MLP consists of, in the order in which it runs."""
        return (self.path, *self.then)

    def stand_in(self, module: nn.Module) -> dict[str, nn.Module]:
        """What has to be where, by path, for `module` to stand in for the MLP."""
        return {self.path: module, **{path: nn.Identity() for path in self.then}}


def architecture_of(config: Any, own: Mlp | None = None) -> Architecture:
    """The row for the config of a base or of a converted model: what a recipe's `base.mlp` says (`own`, or what a checkpoint keeps of it),
    else the table's. Raises InputError for a family that has none."""
    kept = getattr(config, "mxd", None) or {}
    own = own or kept_mlp(kept.get("base"))
    if own is not None:
        return _row(own)
    model_type = str(getattr(config, "model_type", None))
    if kept:
        model_type = model_type.removeprefix("mxd_").removeprefix("own_")
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    if model_type.startswith("mxd_"):
        raise InputError(f"model_type {model_type!r}: this model is already converted; give the model that it came from")
    close = difflib.get_close_matches(model_type, ARCHITECTURES, n=1, cutoff=0.7)
    raise InputError(
        f"model_type {model_type!r}{_why_not(config)} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}"
        + (f" (nearest: {close[0]})" if close else "")
        + ".\nA family of your own: describe its MLP in the recipe's base.mlp; a new one for all is one row in mxd_convert/base_model/families.py"
        " (docs/add-a-family.md)."
    )


def _row(own: Mlp) -> Architecture:
    parts = {key: getattr(own, key) for key in ("up", "down", "gate", "activation", "norm", "after")}
    return Architecture(own.module, **parts, chain=tuple(own.chain))


def kept_mlp(origin: Any) -> Mlp | None:
    """What a checkpoint keeps of a recipe's `base.mlp`, in what it says of its base."""
    kept = origin.get("mlp") if isinstance(origin, dict) else None
    return Mlp.model_validate(kept) if kept else None


def is_mixture(config: Any) -> bool:
    """Whether a model's MLPs are mixtures of experts already."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return any(re.search(r"num(_local|_routed)?_experts$|n_routed_experts$", key) and value for key, value in vars(text).items())


def _why_not(config: Any) -> str:
    """What kind of model it is, where that is why it can't be converted."""
    if is_mixture(config):
        return ", whose MLPs are mixtures of experts already,"
    if getattr(config, "is_encoder_decoder", False):
        return ", an encoder-decoder,"
    if str(config.model_type) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or getattr(config, "is_decoder", True) is False:
        return ", no causal language model,"
    return ""


def find_sites(model: nn.Module, config: Any, indices: Sequence[int], own: Mlp | None = None) -> list[Site]:
    """The MLPs of `model` (its weights may be on the meta device) at the given layers. own: as for `architecture_of`.

    Raises InputError where one is not as the row says.
    """
    row = architecture_of(config, own)
    activation = str(getattr(config, row.activation, row.activation))
    if activation not in ACT2FN:
        raise InputError(f"the MLPs' activation {activation!r} is not one that transformers names, such as gelu, relu or silu")
    return [_site(model, config, row, index, activation) for index in indices]


def _site(model: nn.Module, config: Any, row: Architecture, index: int, activation: str) -> Site:
    path = row.mlp.format(i=index)
    found: dict[str, nn.Module] = {}
    for name in dict.fromkeys((row.up, row.gate or row.up, row.down, *row.chain)):
        try:
            found[name] = model.get_submodule(f"{path}.{name}")
        except AttributeError:
            what = path if _missing(model, path) else f"{path}.{name}"
            raise InputError(
                f"layer {index} of this {config.model_type!r} model has no {what}, where its MLP should be.{suggestion(guess(model, config))}"
            ) from None
    d_in, d_hidden = widths_of(found[row.up], f"{path}.{row.up}")
    wide, d_out = widths_of(found[row.down], f"{path}.{row.down}")
    if row.gate is not None and row.gate == row.up:
        d_hidden //= 2
    if wide != d_hidden:
        raise InputError(
            f"layer {index}: {path}.{row.up} makes {d_hidden} hidden units and {path}.{row.down} takes {wide};"
            + (" a fused projection is named as both gate and up" if d_hidden == 2 * wide else " these are not one MLP")
        )
    return Site(
        index,
        row.place.format(i=index),
        d_in,
        d_hidden,
        d_out,
        activation,
        row.gate is not None,
        then=tuple(name.format(i=index) for name in row.then),
        hidden=f"{path}.{row.down}",
        layer=row.layer.format(i=index),
    )


def _missing(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return True
    return False


def stem_of(model_type: str) -> str:
    """The first part of the names of a family's classes in transformers: `gpt_neox` -> `GPTNeoX`."""
    return str(CONFIG_MAPPING_NAMES[model_type]).removesuffix("Config")
