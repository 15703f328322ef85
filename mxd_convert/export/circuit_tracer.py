"""The layout of circuit-tracer: `layer_<i>.safetensors` for every layer of the model, and config.yaml."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from mxd_convert.errors import InputError
from mxd_convert.export.layout import Entries, Layout
from mxd_convert.files import write_text
from mxd_convert.modeling.layers_mxd import FactoredLayer
from mxd_convert.recipe.kinds import KINDS


class CircuitTracer(Layout):
    """The files of circuit-tracer: one folder with a file per layer, for a model with every layer converted."""

    name = "circuit-tracer"
    names: ClassVar = {
        "gate.weight": "W_enc",
        "gate.bias": "b_enc",
        "experts": "W_dec",
        "output_bias": "b_dec",
        "skip.weight": "W_skip",
    }

    def check(self, config: Any, entries: Entries) -> None:
        """Raise InputError if a layer has no experts, or if layers differ in experts, sparsity, k or skip path."""
        super().check(config, entries)
        count = config.get_text_config().num_hidden_layers
        if missing := [str(index) for index in range(count) if index not in entries]:
            raise InputError(
                f"circuit-tracer replaces every MLP of a model, but layer {', '.join(missing)} of {count} has no experts."
                " Convert all layers, or export --to sparsify."
            )
        for key, what in (("n_experts", "experts"), ("sparsity", "sparsity"), ("k", "active experts"), ("skip", "skip path")):
            found = {index: _value(entry, key) for index, entry in entries.items()}
            other = next((index for index in found if found[index] != found[0]), None)
            if other is not None:
                raise InputError(
                    f"circuit-tracer needs the same {what} in every layer: {found[0]} in layer 0, {found[other]} in layer {other}."
                    " Export --to sparsify."
                )

    def file(self, index: int, hookpoint: str) -> str:
        """Return the name of a layer's file."""
        return f"layer_{index}.safetensors"

    def describe(self, folder: Path, layers: Mapping[int, FactoredLayer], hookpoints: Mapping[int, str], model_name: str) -> None:
        """Write config.yaml."""
        layer = layers[0]
        name = f"local/{Path(model_name).name}-mxd"
        activation = {"activation": "relu"} if layer.sparsity == "l1" else {"activation": "topk", "k": layer.k}
        content = {
            "model_name": model_name,
            "model_kind": "transcoder_set",
            "feature_input_hook": "mlp.hook_in",  # after the norm's weights: circuit-tracer doesn't fold them
            "feature_output_hook": "hook_mlp_out",
            "scan": name,  # read by versions up to 0.5.0; later versions read scan_name
            "scan_name": name,
            **activation,
        }
        write_text(folder / "config.yaml", yaml.safe_dump(content, sort_keys=False))

    def notes(self, entries: Entries) -> list[str]:
        """Return warnings about circuit-tracer's handling of top-k."""
        if entries[0]["sparsity"] == "l1":
            return []
        return [
            "top-k: circuit-tracer 0.5.0 silently reads these files as dense ReLU. Later versions read `activation` and `k`,"
            " but not for a local folder given by its path. docs/other-tools.md shows how to load them correctly in both",
            "circuit-tracer's top-k keeps negative gate values; mxd-convert sets them to 0."
            " `fewer_than_k` is the share of tokens with such a value",
        ]


def _value(entry: Mapping[str, Any], key: str) -> Any:
    if key == "skip":
        return bool(entry.get("skip")) or KINDS[entry["kind"]].has_skip
    return None if key == "k" and entry["sparsity"] == "l1" else entry[key]
