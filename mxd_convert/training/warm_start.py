"""Warm start (`train.init: PATH`): layers initialised from those of another conversion."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mxd_convert.checkpoint.read import load_checkpoint, read_config
from mxd_convert.errors import InputError
from mxd_convert.layers import LayerSpec, Trainable
from mxd_convert.modeling.configuration_mxd import KINDS
from mxd_convert.recipe.presets import is_warm
from mxd_convert.recipe.schema import Recipe

_FREE = ("k", "dropout", "sparsity")  # settings that may differ, because no parameter's shape or meaning depends on them
_FIXES = {
    "n_experts": "layer.experts",
    "d_hidden": "layer.hidden",
    "activation": "layer.activation",
    "skip": "layer.skip",
    "shared_expert": "layer.shared_expert",
}


def fill_open_keys(recipe: Recipe) -> Recipe:
    """Return the recipe of a warm start with `layer.hidden` and `layer.shared_expert` from its checkpoint, where they are null.

    Hidden widths that differ from layer to layer are left to the preset. Raises InputError if the checkpoint can't be read.
    """
    if not is_warm(recipe.train.init):
        return recipe
    entries = _entries(recipe.train.init).values()
    widths = {entry.get("d_hidden") for entry in entries}
    layer = recipe.layer
    update: dict[str, Any] = {}
    if layer.hidden is None and len(widths) == 1:
        update["hidden"] = widths.pop()
    if layer.shared_expert is None:
        update["shared_expert"] = layer.traits.is_product and any(entry.get("shared_expert") for entry in entries)
    return recipe.model_copy(update={"layer": layer.model_copy(update=update)})


def _entries(init: str) -> Mapping[str, Any]:
    """Return the layers' entries in the config of the checkpoint that `train.init` names, by index."""
    if not Path(init).exists():
        raise InputError(f"train.init: {init}: no such folder. Give tokens, paper, or the folder of a converted model.")
    try:
        entries: Mapping[str, Any] = read_config(init).mxd["layers"]
    except InputError as error:
        raise InputError(f"train.init: {error}") from None
    return entries


def check_warm_start(init: str | None, shapes: Mapping[int, LayerSpec]) -> None:
    """Raise InputError if `train.init` names a checkpoint whose layers don't fit. Other values are accepted.

    shapes: of the layers to train, by index.
    """
    if not is_warm(init):
        return
    entries = _entries(init)
    for index, shape in shapes.items():
        theirs = entries.get(str(index))
        if theirs is None:
            raise InputError(
                f"train.init: {init}: layer {index} is not converted there. Set layers to some of {', '.join(entries)}."
            )
        _check_layer(init, index, shape.entry(), theirs)


def _check_layer(init: str, index: int, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    _, defaults = KINDS[str(theirs["kind"])]
    for key, value in ours.items():
        other = theirs.get(key, defaults.get(key))
        if key in _FREE or other == value:
            continue
        if key == "kind":
            fix = f"Set layer.kind: {other}."
        elif key in _FIXES:
            fix = f"Set {_FIXES[key]}: {str(other).lower() if isinstance(other, bool) else other}."
        else:
            fix = "Give a conversion of a model of the same size."
        raise InputError(f"train.init: {init}: layer {index} has {key} {other} there, and {value} in this recipe. {fix}")


@torch.no_grad()
def copy_layers(layers: Mapping[int, Trainable], init: str) -> None:
    """Copy the parameters of the checkpoint's layers, by index, into `layers`."""
    theirs = load_checkpoint(init, dtype="float32", finite=True).mxd_layers()
    for index, layer in layers.items():
        layer.load_state_dict(theirs[index].state_dict())


__all__ = ["check_warm_start", "copy_layers", "fill_open_keys"]
