"""`revert`: chosen layers of a checkpoint get their original MLPs back, in a new folder."""

import json
import shutil
import tempfile
from pathlib import Path

from mxd_convert import surgery
from mxd_convert.base import load_tokenizer, quiet
from mxd_convert.checkpoint import LOCAL, base_of, load_checkpoint, original_of
from mxd_convert.errors import InputError, disk_guard
from mxd_convert.labels import read_labels, write_labels
from mxd_convert.recipe import layer_indices


def revert(checkpoint: str | Path, layers: list[int] | str, output: str | Path, base: str | None = None) -> Path:
    """Writes a copy of a checkpoint in which the given layers have their original MLPs again; all layers: the base's own class.

    layers: [3, 4], "3,4", "0-2" or "all". The copy has no mxd_report.json: its figures would be those of another model. Raises InputError.
    """
    output = Path(output)
    if Path(checkpoint).resolve() in output.resolve().parents:
        raise InputError(f"--output {output}: lies inside the checkpoint; choose another folder")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output {output}: exists already; choose another folder")
    converted = load_checkpoint(checkpoint)
    try:
        indices = list(converted.mxd_layers()) if layers == "all" else layer_indices(layers, None)
    except ValueError as error:
        raise InputError(f"--{error}") from None
    original = original_of(checkpoint, converted, base)
    model = surgery.revert(converted, original, indices)
    output.parent.mkdir(parents=True, exist_ok=True)
    with disk_guard(output), quiet(), tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        work = Path(scratch) / "checkpoint"
        model.save_pretrained(work)
        if (Path(checkpoint) / "recipe.yaml").is_file() and hasattr(model, "mxd_layers"):
            shutil.copyfile(Path(checkpoint) / "recipe.yaml", work / "recipe.yaml")  # evaluation takes its block length from it
        load_tokenizer(str(checkpoint)).save_pretrained(work)
        if hasattr(model, "mxd_layers"):
            write_labels(work, [label for label in read_labels(checkpoint) if label.layer not in indices])
        if (Path(checkpoint) / LOCAL).is_file() and hasattr(model, "mxd_layers"):
            (work / LOCAL).write_text(json.dumps({"base": base_of(checkpoint, base).model}, indent=2) + "\n")
        if output.exists():
            output.rmdir()
        work.rename(output)
    return output
