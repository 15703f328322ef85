"""The one table of supported families: the path, projections and activation of their MLPs, by model_type.

A new family is a new row (docs/add-a-family.md).
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.activations import ACT2FN
from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mxd_convert.base_model.detect import guess, suggestion, widths_of
from mxd_convert.errors import InputError
from mxd_convert.recipe.schema import Mlp


@dataclass(frozen=True)
class Architecture:
    """The location of the MLPs in a family of causal LMs.

    `{i}` in `mlp` is the layer's index. Projections are paths within the module `mlp`.

    `chain` is for an MLP without a module of its own, or whose module also adds the residual. It names the modules within `mlp`
    that make up the MLP, in the order in which they run. The layer replaces the first of them, and the others become identities.
    """

    mlp: str
    up: str
    down: str
    activation: str  # the config key of the activation, or the activation itself if the config has no key
    norm: str | None = None  # the final norm, before the head
    gate: str | None = None  # the activated projection of a GLU; the same as `up` if one matrix has both, the gate's half first
    chain: tuple[str, ...] = ()
    flat: str | None = None  # a module with inputs (B, T, ...), in a decoder layer that later flattens its tokens to one axis
    after: str | None = None  # the norm in the decoder layer between the MLP's output and the residual stream
    scale: str | None = None  # the config key of the factor on the MLP's output
    dropout: str | None = None  # the config key of the dropout on the MLP's output, if the MLP applies it

    @property
    def layer(self) -> str:
        """The path of the decoder layer, with `{i}`."""
        return self.mlp[: self.mlp.index("{i}") + len("{i}")]

    @property
    def path(self) -> str:
        """The path of the module that a converted layer replaces, with `{i}`."""
        return f"{self.mlp}.{self.chain[0]}" if self.chain else self.mlp

    def description(self, activation: str) -> str:
        """Return a description of the MLP, such as `model.layers.{i}.mlp: silu(gate_proj) * up_proj > down_proj`."""
        halves = f"{activation} of the first half of {self.up} times the second"
        up = f"{activation}({self.up})" if self.gate is None else f"{activation}({self.gate}) * {self.up}"
        chain = f" (of {', '.join(self.chain)})" if self.chain else ""
        return f"{self.mlp}: {halves if self.gate == self.up else up} > {self.down}{chain}"

    @property
    def bypassed(self) -> tuple[str, ...]:
        """The paths of the rest of the chain, with `{i}`, which become identities."""
        return tuple(f"{self.mlp}.{name}" for name in self.chain[1:])


def _glu(
    mlp: str = "model.layers.{i}.mlp", norm: str = "model.norm", activation: str = "hidden_act", **more: Any
) -> Architecture:
    """Return the row of a GLU with the names that most families since Llama have."""
    return Architecture(mlp, "up_proj", "down_proj", activation, norm, gate="gate_proj", **more)


ARCHITECTURES: dict[str, Architecture] = {
    "bloom": Architecture(
        "transformer.h.{i}.mlp",
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        activation="gelu_pytorch_tanh",  # the same function as Bloom's own module
        norm="transformer.ln_f",
        chain=("dense_h_to_4h", "gelu_impl", "dense_4h_to_h"),  # the MLP's module also adds the residual
    ),
    "cohere": _glu(),
    "falcon": Architecture(
        "transformer.h.{i}.mlp", up="dense_h_to_4h", down="dense_4h_to_h", activation="activation", norm="transformer.ln_f"
    ),
    "gemma": _glu(),
    "gemma2": _glu(activation="hidden_activation", after="post_feedforward_layernorm"),
    "gemma3": _glu(
        "model.language_model.layers.{i}.mlp",  # with images; its language model is a gemma3_text
        "model.language_model.norm",
        activation="hidden_activation",
        after="post_feedforward_layernorm",
    ),
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
    "mistral3": _glu(
        "model.language_model.layers.{i}.mlp", "model.language_model.norm"
    ),  # with images; its language model is a mistral
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
    """The location, widths and activation of one MLP in a model.

    Attributes:
        index: The layer's index.
        path: The module that a layer replaces.
        d_in: The width of the input.
        d_hidden: The number of hidden units.
        d_out: The width of the output.
        activation: The name of the activation.
        glu: Whether the MLP is a GLU.
        then: The modules that become identities, if the MLP is a chain of modules.
        hidden: The module whose input is the hidden units.
        layer: The decoder layer.
    """

    index: int
    path: str
    d_in: int
    d_hidden: int
    d_out: int
    activation: str
    glu: bool
    bypassed: tuple[str, ...] = ()
    hidden: str = ""
    layer: str = ""

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that make up the MLP, in the order in which they run."""
        return (self.path, *self.bypassed)

    def replacements(self, module: nn.Module) -> dict[str, nn.Module]:
        """Return the modules by path that replace the MLP by `module`."""
        return {self.path: module, **{path: nn.Identity() for path in self.bypassed}}


def architecture_of(config: Any, own: Mlp | None = None) -> Architecture:
    """Return the row for the config of a base or converted model.

    own: a recipe's `base.mlp`, which takes precedence over that of the checkpoint, and both over the table. Raises InputError if
    none of them describes the family.
    """
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
        raise InputError(f"model_type {model_type!r}: this model is already converted. Give its base model.")
    close = difflib.get_close_matches(model_type, ARCHITECTURES, n=1, cutoff=0.7)
    raise InputError(
        f"model_type {model_type!r}{_why_not(config)} is not supported. Supported: {', '.join(sorted(ARCHITECTURES))}"
        + (f" (nearest: {close[0]})" if close else "")
        + ".\nDescribe the MLP of another family in the recipe's base.mlp, or add a row to mxd_convert/base_model/families.py"
        " (docs/add-a-family.md)."
    )


def _row(own: Mlp) -> Architecture:
    fields = {key: getattr(own, key) for key in ("up", "down", "gate", "activation", "norm", "after")}
    return Architecture(own.module, **fields, chain=tuple(own.chain))


def kept_mlp(origin: Any) -> Mlp | None:
    """Return the recipe's `base.mlp` from a checkpoint's record of its base, or None if it has none."""
    kept = origin.get("mlp") if isinstance(origin, dict) else None
    return Mlp.model_validate(kept) if kept else None


def is_mixture(config: Any) -> bool:
    """Return whether a model's MLPs are mixtures of experts already."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return any(re.search(r"num(_local|_routed)?_experts$|n_routed_experts$", key) and value for key, value in vars(text).items())


def _why_not(config: Any) -> str:
    """Return the kind of model if it can't be converted because of its kind, else ""."""
    if is_mixture(config):
        return ", whose MLPs are mixtures of experts already,"
    if getattr(config, "is_encoder_decoder", False):
        return ", an encoder-decoder,"
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    if str(config.model_type) not in known or getattr(config, "is_decoder", True) is False:
        return ", no causal language model,"
    return ""


def find_sites(model: nn.Module, config: Any, indices: Sequence[int], own: Mlp | None = None) -> list[Site]:
    """Return the MLPs of `model` at the given layer indices. The model's weights may be on the meta device.

    own: as for `architecture_of`. Raises InputError if an MLP doesn't match the row.
    """
    row = architecture_of(config, own)
    activation = str(getattr(config.get_text_config(), row.activation, row.activation))
    if activation not in ACT2FN:
        raise InputError(
            f"the MLPs' activation {activation!r} is unknown to transformers. Set base.mlp.activation to, for example, gelu, relu or silu."
        )
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
                f"layer {index} of this {config.model_type!r} model has no {what}, where its MLP should be. Describe its MLP in base.mlp."
                + suggestion(guess(model, config))
            ) from None
    d_in, d_hidden = widths_of(found[row.up], f"{path}.{row.up}")
    wide, d_out = widths_of(found[row.down], f"{path}.{row.down}")
    if row.gate is not None and row.gate == row.up:
        d_hidden //= 2
    if wide != d_hidden:
        raise InputError(
            f"layer {index}: {path}.{row.up} makes {d_hidden} hidden units and {path}.{row.down} takes {wide}."
            + (
                " Name a fused projection as both gate and up."
                if d_hidden == 2 * wide
                else " Name two projections of one MLP in base.mlp."
            )
        )
    return Site(
        index,
        row.path.format(i=index),
        d_in,
        d_hidden,
        d_out,
        activation,
        row.gate is not None,
        bypassed=tuple(name.format(i=index) for name in row.bypassed),
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
    """Return the prefix of a family's class names in transformers, such as `GPTNeoX` for `gpt_neox`."""
    return str(CONFIG_MAPPING_NAMES[model_type]).removesuffix("Config")
