"""The layout of EleutherAI's sparsify: one folder per module, with cfg.json and sae.safetensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from mxd_convert.export.layout import Entries, Layout
from mxd_convert.files import write_json
from mxd_convert.modeling.layers_mxd import FactoredLayer


class Sparsify(Layout):
    """The files of sparsify: one folder per module."""

    name = "sparsify"
    names: ClassVar = {
        "gate.weight": "encoder.weight",
        "gate.bias": "encoder.bias",
        "experts": "W_dec",
        "output_bias": "b_dec",
        "skip.weight": "W_skip",
    }

    def file(self, index: int, hookpoint: str) -> str:
        """Return the file of a layer's tensors, in the module's folder."""
        return f"{hookpoint}/sae.safetensors"

    def describe(self, folder: Path, layers: Mapping[int, FactoredLayer], hookpoints: Mapping[int, str], model_name: str) -> None:
        """Write cfg.json of every module."""
        for index, layer in layers.items():
            write_json(folder / hookpoints[index] / "cfg.json", _settings(layer))

    def notes(self, entries: Entries) -> list[str]:
        """Return a note on layers with `sparsity: l1`."""
        penalised = [str(index) for index, entry in entries.items() if entry["sparsity"] == "l1"]
        if not penalised:
            return []
        return [
            f"layer {', '.join(penalised)}: trained with sparsity: l1. sparsify supports only top-k, so cfg.json sets k to the number"
            " of experts, which is equivalent"
        ]


def _settings(layer: FactoredLayer) -> dict[str, Any]:
    """Return the content of cfg.json. It sets every key whose default would be wrong."""
    return {
        "activation": "topk",
        "expansion_factor": layer.n_experts // layer.d_in,  # num_latents overrides it
        "normalize_decoder": False,
        "num_latents": layer.n_experts,
        "k": layer.n_experts if layer.sparsity == "l1" else layer.k,
        "multi_topk": False,
        "skip_connection": layer.skip is not None,
        "transcode": True,
        "d_in": layer.d_in,
    }
