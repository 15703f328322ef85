"""`delta`: write only the tensors and files that a conversion changed, without the base's weights."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mxd_convert.base_model.load import stored_tensors
from mxd_convert.checkpoint.delta import FORMAT_VERSION, FULL, LAYERS
from mxd_convert.checkpoint.read import (
    DELTA,
    LOCAL,
    REPORT,
    belonging,
    check_new,
    load_checkpoint,
    new_folder,
    original_of,
    read_config,
    read_local,
    read_report,
    recipe_of,
    recorded_base,
    weight_files,
)
from mxd_convert.files import file_sha256, write_json
from mxd_convert.report.card import write_card


@dataclass(frozen=True)
class Delta:
    """A written delta.

    Attributes:
        output: the delta's folder.
        size: size of the delta's folder in bytes.
        full_size: size of the full checkpoint in bytes.
        tensors: number of tensors that differ from the base's.
    """

    output: Path
    size: int
    full_size: int
    tensors: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**vars(self), "output": str(self.output)}


def delta(checkpoint: str | Path, output: str | Path, base: str | None = None) -> Delta:
    """Write the tensors and files of a checkpoint that its base model doesn't have.

    Args:
        checkpoint: folder of a converted checkpoint.
        output: folder to write.
        base: the base model, if it is not the recorded one.

    Raises:
        InputError: if the checkpoint can't be read, `base` is not its base model, or `output` exists already.
    """
    folder, output = Path(checkpoint), Path(output)
    check_new(output, folder)
    config = read_config(folder)
    converted = load_checkpoint(folder)
    theirs = stored_tensors(original_of(folder, converted, base))
    ours = stored_tensors(converted)
    own = {name: tensor.contiguous() for name, tensor in ours.items() if not _same(tensor, theirs.get(name))}
    files = belonging(folder)
    weights = weight_files(folder)
    content = {
        "format_version": FORMAT_VERSION,
        "base": recorded_base(config),
        "layers": config.mxd["layers"],
        "weights": [{"path": file.relative_to(folder).as_posix(), "header": _header(file)} for file in weights],
        "files": {path: file_sha256(folder / path) for path in files},
    }
    with new_folder(output, folder) as work:
        for path in files:
            if folder / path not in weights:
                (work / FULL / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / path, work / FULL / path)
        save_file(own, work / LAYERS, metadata={"format": "pt"})
        content["layers_sha256"] = file_sha256(work / LAYERS)
        write_json(work / DELTA, content)
        if local := read_local(folder).get("base"):
            write_json(work / LOCAL, {"base": local})
        _write_card(folder, work, config)
    return Delta(output, _size(output), sum((folder / path).stat().st_size for path in files), len(own))


def _header(file: Path) -> str:
    """Return the JSON header of a safetensors file as text, unchanged."""
    with file.open("rb") as content:
        return content.read(int.from_bytes(content.read(8), "little")).decode()


def _same(ours: Tensor, theirs: Tensor | None) -> bool:
    """Return whether two tensors are equal bit for bit. A numeric comparison would accept 0 and -0."""
    if theirs is None or ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    one, other = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (ours, theirs))
    return one.equal(other)


def _size(folder: Path) -> int:
    """Return the size of the folder's files in bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _write_card(folder: Path, work: Path, config: Any) -> None:
    """Write the delta's card from the checkpoint's report and recipe; its figures are those of the full checkpoint."""
    if not (folder / REPORT).is_file():
        return
    report = read_report(folder)
    assert report is not None
    write_card(work, report, recipe_of(folder), base_on_hub=not recorded_base(config).get("local", True), full=work / FULL)
