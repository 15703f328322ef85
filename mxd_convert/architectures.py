"""ONE table: model_type -> where the MLP sits, its projections, activation, GLU or not. A new family is a new row."""

import difflib
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.activations import ACT2FN

from mxd_convert.errors import InputError


@dataclass(frozen=True)
class Architecture:
    """How a family of causal LMs holds its MLPs. `{i}` is the layer's index; projections are attributes of the MLP module; `norm` is the last one."""

    mlp: str
    norm: str
    up: str
    down: str
    activation: str  # key of the config that names the activation
    gate: str | None = None  # the activated projection of a GLU; None: a plain MLP
    dropout: str | None = None  # key of the config that names the dropout on the MLP's output, where the MLP itself applies it

    def layer(self, index: int) -> str:
        """The path of a whole decoder layer."""
        return self.mlp.format(i=index).rpartition(".")[0]


ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(
        "transformer.h.{i}.mlp",
        "transformer.ln_f",
        up="c_fc",
        down="c_proj",
        activation="activation_function",
        dropout="resid_pdrop",
    ),
    "gpt_neox": Architecture(
        "gpt_neox.layers.{i}.mlp", "gpt_neox.final_layer_norm", up="dense_h_to_4h", down="dense_4h_to_h", activation="hidden_act"
    ),
    "llama": Architecture(
        "model.layers.{i}.mlp", "model.norm", up="up_proj", down="down_proj", activation="hidden_act", gate="gate_proj"
    ),
}


@dataclass(frozen=True)
class Site:
    """One MLP of a model: where it is and what it computes. Widths in features."""

    index: int
    path: str
    d_in: int
    d_hidden: int
    d_out: int
    activation: str
    glu: bool


def architecture_of(config: Any) -> Architecture:
    """The table's row for a model's config. Raises InputError for a family that has none."""
    model_type = str(getattr(config, "model_type", None))
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    if model_type.startswith("mxd_"):
        raise InputError(f"model_type {model_type!r}: this model is already converted; give the model that it came from")
    close = difflib.get_close_matches(model_type, ARCHITECTURES, n=1, cutoff=0.8)
    raise InputError(
        f"model_type {model_type!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}"
        + (f" (nearest: {close[0]})" if close else "")
        + ". A new family is one row in mxd_convert/architectures.py."
    )


def find_sites(model: nn.Module, config: Any, indices: list[int]) -> list[Site]:
    """The MLPs of `model` (its weights may be on the meta device) at the given layers. Raises InputError where one is not as the table says."""
    row = architecture_of(config)
    sites = []
    for index in indices:
        path = row.mlp.format(i=index)
        try:
            mlp = model.get_submodule(path)
            d_in, d_hidden = _widths(mlp.get_submodule(row.up))
            _, d_out = _widths(mlp.get_submodule(row.down))
            if row.gate is not None:
                mlp.get_submodule(row.gate)
        except AttributeError as error:
            raise InputError(f"layer {index} has no MLP where {config.model_type!r} models keep it ({path}): {error}") from None
        if getattr(config, row.activation) not in ACT2FN:
            raise InputError(
                f"layer {index}: the activation {getattr(config, row.activation)!r} is not one that transformers names"
            )
        sites.append(Site(index, path, d_in, d_hidden, d_out, str(getattr(config, row.activation)), row.gate is not None))
    return sites


def _widths(projection: nn.Module) -> tuple[int, int]:
    """(input, output) width of a Linear or of GPT-2's Conv1D, which holds its weight transposed."""
    weight = projection.weight
    assert isinstance(weight, nn.Parameter)
    rows, columns = weight.shape
    return (columns, rows) if isinstance(projection, nn.Linear) else (rows, columns)
