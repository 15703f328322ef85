"""Coefficients on a text in the format of EleutherAI's delphi: <module>/<first>_<last>.safetensors and config.json.

A file holds the experts first to last: `locations` (P, 3), (block, position, expert - first), and `activations` (P), in the order of
the text; beside them the text's `tokens`. P: pairs of an expert and a token on which it is active.
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
from mxd_convert.modeling.layers_mxd import Codes

SPLITS = 5  # as in delphi
SUMMARY = "mxd_cache.json"
_LEAST = 1e-5  # what delphi takes for zero
_MOST = float(np.finfo(np.float16).max)
_DTYPES: dict[str, np.dtype[Any]] = {
    "I64": np.dtype("<i8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
}

Array = np.ndarray[Any, np.dtype[Any]]


def active_entries(codes: Codes, counted_BT: Tensor) -> tuple[Array, Array, Array, Array]:
    """(blocks, positions, experts, values), (P) each, by block, position and expert: what is above delphi's zero where positions count."""
    if isinstance(codes, Tensor):
        active_BTN = (codes > _LEAST) & counted_BT.unsqueeze(-1)
        place = active_BTN.nonzero(as_tuple=True)
        found = (*place, codes[active_BTN])
    else:
        indices_BTK, order_BTK = codes[1].sort(dim=-1)
        values_BTK = codes[0].gather(-1, order_BTK)
        active_BTK = (values_BTK > _LEAST) & counted_BT.unsqueeze(-1)
        place = active_BTK.nonzero(as_tuple=True)
        found = (place[0], place[1], indices_BTK[active_BTK], values_BTK[active_BTK])
    block_P, position_P, expert_P, value_P = (tensor.cpu().numpy() for tensor in found)
    return block_P, position_P, expert_P, value_P


class LayerCache:
    """One layer's coefficients: split by expert into raw files as they come, then each made a safetensors file without reading it in."""

    def __init__(self, folder: Path, n_experts: int, splits: int, blocks: Blocks) -> None:
        folder.mkdir()
        self.folder = folder
        # delphi's own borders; a reader takes them from the names of the files
        self.starts = torch.linspace(0, n_experts, splits + 1).long().tolist()
        widest = max(last - first for first, last in zip(self.starts, self.starts[1:], strict=False))
        self.wide = "U16" if max(len(blocks), blocks.context, widest) <= 2**16 else "U32"
        self.counts = [0] * splits
        self.fired_N = np.zeros(n_experts, dtype=bool)

    def add(self, block_P: Array, position_P: Array, expert_P: Array, value_P: Array) -> None:
        self.fired_N[expert_P] = True
        split_P = np.searchsorted(self.starts, expert_P, side="right") - 1
        for split, first in enumerate(self.starts[:-1]):
            here_P = split_P == split
            locations = np.stack([block_P[here_P], position_P[here_P], expert_P[here_P] - first], axis=-1)
            activations = np.minimum(value_P[here_P], _MOST)
            for name, array, kind in (("locations", locations, self.wide), ("activations", activations, "F16")):
                with (self.folder / f"{split}.{name}").open("ab") as file:
                    file.write(np.ascontiguousarray(array.astype(_DTYPES[kind])).tobytes())
            self.counts[split] += len(locations)

    def write(self, place: Path, blocks: Blocks) -> None:
        place.mkdir(parents=True)
        for split, (first, last) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            count = self.counts[split]
            shapes = {
                "tokens": ("I64", list(blocks.ids.shape)),
                "locations": (self.wide, [count, 3]),
                "activations": ("F16", [count]),
            }
            with replacing(place / f"{first}_{last - 1}.safetensors") as temporary, temporary.open("wb") as file:
                file.write(safetensors_header(shapes))
                for start in range(0, len(blocks), 1024):
                    file.write(blocks.ids[start : start + 1024].astype(_DTYPES["I64"]).tobytes())
                for name in ("locations", "activations"):
                    with (self.folder / f"{split}.{name}").open("rb") as raw:
                        shutil.copyfileobj(raw, file)
                    (self.folder / f"{split}.{name}").unlink()

    def figures(self) -> dict[str, Any]:
        return {"entries": sum(self.counts), "never_fired": int((~self.fired_N).sum())}


def safetensors_header(shapes: Mapping[str, tuple[str, list[int]]]) -> bytes:
    """The head of a safetensors file whose tensors, (dtype, shape) by name, follow one after the other in this order."""
    header, offset = {}, 0
    for name, (dtype, shape) in shapes.items():
        size = int(np.prod(shape, dtype=np.int64)) * _DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
