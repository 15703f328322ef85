"""Coefficients on a text in the format of EleutherAI's delphi: `<module>/<first>_<last>.safetensors` and config.json.

A file covers the experts `first` to `last`. It has `locations` (P, 3), each (block, position, expert - first), and
`activations` (P), both in text order, and the text's `tokens`. P: pairs of an expert and a token on which it is active.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mxd_convert.data.blocks import Blocks
from mxd_convert.files import replacing
from mxd_convert.modeling.layers_mxd import Coefficients

SPLITS = 5  # files per layer, delphi's default
SUMMARY = "mxd_cache.json"
_MIN_COEFFICIENT = 1e-5  # delphi treats coefficients up to this as 0
_MAX_COEFFICIENT = float(np.finfo(np.float16).max)
_DTYPES: dict[str, np.dtype[Any]] = {
    "I64": np.dtype("<i8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
}

Array = np.ndarray[Any, np.dtype[Any]]


def active_entries(coefficients: Coefficients, counted_BT: Tensor) -> tuple[Array, Array, Array, Array]:
    """Return (blocks, positions, experts, values), (P) each, of coefficients above `_MIN_COEFFICIENT` at counted positions.

    Entries are sorted by block, position and expert. coefficients: as `encode` returns them for (B, T, I). counted_BT: bool mask.
    """
    if isinstance(coefficients, Tensor):
        active_BTN = (coefficients > _MIN_COEFFICIENT) & counted_BT.unsqueeze(-1)
        where = active_BTN.nonzero(as_tuple=True)
        found = (*where, coefficients[active_BTN])
    else:
        indices_BTK, order_BTK = coefficients[1].sort(dim=-1)
        values_BTK = coefficients[0].gather(-1, order_BTK)
        active_BTK = (values_BTK > _MIN_COEFFICIENT) & counted_BT.unsqueeze(-1)
        where = active_BTK.nonzero(as_tuple=True)
        found = (where[0], where[1], indices_BTK[active_BTK], values_BTK[active_BTK])
    block_P, position_P, expert_P, value_P = (tensor.cpu().numpy() for tensor in found)
    return block_P, position_P, expert_P, value_P


class LayerCache:
    """Writer of one layer's coefficients.

    `add` appends them to raw files, split by expert. `write` copies these into safetensors files, at constant memory.

    Args:
        folder: empty folder for the raw files.
        n_experts: number of experts of the layer.
        splits: number of files.
        blocks: the text.
    """

    def __init__(self, folder: Path, n_experts: int, splits: int, blocks: Blocks) -> None:
        self.folder = folder
        # boundaries computed as in delphi; a reader takes them from the file names
        self.starts = torch.linspace(0, n_experts, splits + 1).long().tolist()
        widest = max(last - first for first, last in zip(self.starts, self.starts[1:], strict=False))
        self.wide = "U16" if max(len(blocks), blocks.context, widest) <= 2**16 else "U32"
        self.counts = [0] * splits
        self.fired_N = np.zeros(n_experts, dtype=bool)

    def add(self, block_P: Array, position_P: Array, expert_P: Array, value_P: Array) -> None:
        """Append the entries of one batch, as `active_entries` returns them, with `block_P` relative to the whole text."""
        self.fired_N[expert_P] = True
        split_P = np.searchsorted(self.starts, expert_P, side="right") - 1
        for split, first in enumerate(self.starts[:-1]):
            here_P = split_P == split
            locations = np.stack([block_P[here_P], position_P[here_P], expert_P[here_P] - first], axis=-1)
            activations = np.minimum(value_P[here_P], _MAX_COEFFICIENT)
            for name, array, kind in (("locations", locations, self.wide), ("activations", activations, "F16")):
                with (self.folder / f"{split}.{name}").open("ab") as file:
                    file.write(np.ascontiguousarray(array.astype(_DTYPES[kind])).tobytes())
            self.counts[split] += len(locations)

    def write(self, target: Path, blocks: Blocks) -> None:
        """Write the safetensors files into the new folder `target`, and delete the raw files."""
        target.mkdir(parents=True)
        for split, (first, last) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            count = self.counts[split]
            shapes = {
                "tokens": ("I64", list(blocks.ids.shape)),
                "locations": (self.wide, [count, 3]),
                "activations": ("F16", [count]),
            }
            with replacing(target / f"{first}_{last - 1}.safetensors") as temporary, temporary.open("wb") as file:
                file.write(safetensors_header(shapes))
                for start in range(0, len(blocks), 1024):
                    file.write(blocks.ids[start : start + 1024].astype(_DTYPES["I64"]).tobytes())
                for name in ("locations", "activations"):
                    with (self.folder / f"{split}.{name}").open("rb") as raw:
                        shutil.copyfileobj(raw, file)
                    (self.folder / f"{split}.{name}").unlink()

    def figures(self) -> dict[str, Any]:
        """Return the number of entries and the number of experts that never fired."""
        return {"entries": sum(self.counts), "never_fired": int((~self.fired_N).sum())}


def safetensors_header(shapes: Mapping[str, tuple[str, list[int]]]) -> bytes:
    """Return the header of a safetensors file with contiguous tensors, in the order of `shapes`: (dtype, shape) by name."""
    header, offset = {}, 0
    for name, (dtype, shape) in shapes.items():
        size = int(np.prod(shape, dtype=np.int64)) * _DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
