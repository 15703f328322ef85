"""The base class of transcoder layouts: check, write and read back a tool's files."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import load_file, save_file

from mxd_convert.errors import InputError
from mxd_convert.export.surrogate import empty_surrogate
from mxd_convert.files import replacing
from mxd_convert.modeling.layers_mxd import FactoredLayer, Transcoder

Entries = Mapping[int, Mapping[str, Any]]  # the layers' entries in config.json, by layer index


class Layout(ABC):
    """The file layout of one tool.

    Attributes:
        name: the tool's name.
        names: maps the names of a surrogate's tensors to the tool's names. Shapes are unchanged: gate (N, I), rows (N, O),
            skip path (O, I).
    """

    name: ClassVar[str]
    names: ClassVar[dict[str, str]]

    def check(self, config: Any, entries: Entries) -> None:
        """Raise InputError if the layout can't represent these layers. config: the checkpoint's config."""
        for index, entry in entries.items():
            if entry["d_in"] != entry["d_out"]:
                raise InputError(
                    f"layer {index} maps {entry['d_in']} features to {entry['d_out']}, but {self.name} supports only layers of equal width"
                )

    @abstractmethod
    def file(self, index: int, hookpoint: str) -> str:
        """Return the file of a layer's tensors, relative to the exported folder. hookpoint: see `sources.hookpoint`."""

    @abstractmethod
    def describe(self, folder: Path, layers: Mapping[int, FactoredLayer], hookpoints: Mapping[int, str], model_name: str) -> None:
        """Write the tool's config files. model_name: name of the base model."""

    def notes(self, entries: Entries) -> list[str]:
        """Return warnings for users of these files."""
        return []

    def write(self, folder: Path, index: int, hookpoint: str, surrogate: Transcoder) -> None:
        """Write one layer's tensors in their own dtype."""
        path = folder / self.file(index, hookpoint)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {self.names[name]: tensor.cpu().contiguous() for name, tensor in surrogate.state_dict().items()}
        with replacing(path) as temporary:
            save_file(tensors, temporary)

    def read(self, folder: Path, index: int, hookpoint: str, layer: FactoredLayer) -> Transcoder:
        """Return a layer's surrogate as read from its file, on the device of `layer`."""
        ours = {theirs: name for name, theirs in self.names.items()}
        tensors = load_file(folder / self.file(index, hookpoint), device=str(layer.output_bias.device))
        surrogate = empty_surrogate(layer)
        surrogate.load_state_dict({ours[name]: tensor for name, tensor in tensors.items()}, assign=True)
        return surrogate.eval().requires_grad_(False)
