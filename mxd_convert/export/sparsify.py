"""The layout of EleutherAI's sparsify: a folder a module, with cfg.json and sae.safetensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from mxd_convert.export.layout import Entries, Layout
from mxd_convert.files import write_json
from mxd_convert.modeling.layers_mxd import FactoredLayer


class Sparsify(Layout):
    name = "sparsify"
    names: ClassVar = {
        "gate.weight": "encoder.weight",
        "gate.bias": "encoder.bias",
        "experts": "W_dec",
        "output_bias": "b_dec",
        "skip.weight": "W_skip",
    }

    def file(self, index: int, hookpoint: str) -> str:
        return f"{hookpoint}/sae.safetensors"

    def describe(self, folder: Path, layers: Mapping[int, FactoredLayer], hookpoints: Mapping[int, str], model_name: str) -> None:
        for index, layer in layers.items():
            write_json(folder / hookpoints[index] / "cfg.json", _settings(layer))

    def notes(self, entries: Entries) -> list[str]:
        penalised = [str(index) for index, entry in entries.items() if entry["sparsity"] == "l1"]
        if not penalised:
            return []
        return [
            f"layer {', '.join(penalised)}: of sparsity l1; sparsify knows top-k only, so k is the number of experts, which is the same"
        ]


def _settings(layer: FactoredLayer) -> dict[str, Any]:
    """cfg.json. What is left out there has defaults that would not fit."""
    return {
        "activation": "topk",
        "expansion_factor": layer.n_experts // layer.d_in,  # num_latents goes before it
        "normalize_decoder": False,
        "num_latents": layer.n_experts,
        "k": layer.n_experts if layer.sparsity == "l1" else layer.k,
        "multi_topk": False,
        "skip_connection": layer.skip is not None,
        "transcode": True,
        "d_in": layer.d_in,
    }
