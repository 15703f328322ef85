"""What the layouts of transcoders have in common: tensors renamed and written, read back, and what can't be written."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import load_file, save_file

from mxd_convert.errors import InputError
from mxd_convert.export.surrogate import empty_surrogate
from mxd_convert.files import replacing
from mxd_convert.modeling.layers_mxd import FactoredLayer, Transcoder

Entries = Mapping[int, Mapping[str, Any]]  # of config.json, by layer index


class Layout(ABC):
    """One tool's files. `names`: a surrogate's tensors -> the tool's. Nothing is transposed: (N, I) gate, (N, O) rows, (O, I) skip path."""

    name: ClassVar[str]
    names: ClassVar[dict[str, str]]

    def check(self, config: Any, entries: Entries) -> None:
        """Raises InputError where the layers can't be written so. config: of the checkpoint. entries: of the layers to export."""
        for index, entry in entries.items():
            if entry["d_in"] != entry["d_out"]:
                raise InputError(
                    f"layer {index} maps {entry['d_in']} features to {entry['d_out']}; {self.name} knows transcoders of one width only"
                )

    @abstractmethod
    def file(self, index: int, hookpoint: str) -> str:
        """Where a layer's tensors go, relative to the folder. hookpoint: the MLP's path as seen from the model without its head."""

    @abstractmethod
    def describe(self, folder: Path, layers: Mapping[int, FactoredLayer], hookpoints: Mapping[int, str], model_name: str) -> None:
        """Writes what the tool reads beside the tensors. model_name: of the base."""

    def notes(self, entries: Entries) -> list[str]:
        """What a user of these files should know."""
        return []

    def write(self, folder: Path, index: int, hookpoint: str, surrogate: Transcoder) -> None:
        """Writes one layer's tensors, in the dtype that they have."""
        path = folder / self.file(index, hookpoint)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {self.names[name]: tensor.cpu().contiguous() for name, tensor in surrogate.state_dict().items()}
        with replacing(path) as temporary:
            save_file(tensors, temporary)

    def read(self, folder: Path, index: int, hookpoint: str, layer: FactoredLayer) -> Transcoder:
        """The surrogate as written, where `layer` is on."""
        ours = {theirs: name for name, theirs in self.names.items()}
        tensors = load_file(folder / self.file(index, hookpoint), device=str(layer.output_bias.device))
        surrogate = empty_surrogate(layer)
        surrogate.load_state_dict({ours[name]: tensor for name, tensor in tensors.items()}, assign=True)
        return surrogate.eval().requires_grad_(False)
