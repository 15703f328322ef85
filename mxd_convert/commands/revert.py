"""`revert`: chosen layers of a checkpoint get their original MLPs back, in a new folder."""

import shutil
from pathlib import Path

from mxd_convert.base_model import swap
from mxd_convert.base_model.load import load_tokenizer
from mxd_convert.checkpoint.labels import read_labels, write_labels
from mxd_convert.checkpoint.read import LOCAL, base_of, check_new, load_checkpoint, new_folder, original_of
from mxd_convert.errors import InputError
from mxd_convert.files import write_json
from mxd_convert.recipe.schema import layer_indices


def revert(checkpoint: str | Path, layers: list[int] | str, output: str | Path, base: str | None = None) -> Path:
    """Writes a copy of a checkpoint in which the given layers have their original MLPs again; all layers: the base's own class.

    layers: [3, 4], "3,4", "0-2" or "all". The copy has no mxd_report.json: its figures would be those of another model. Raises InputError.
    """
    output = Path(output)
    check_new(output, Path(checkpoint))
    converted = load_checkpoint(checkpoint)
    try:
        indices = list(converted.mxd_layers()) if layers == "all" else layer_indices(layers, None)
    except ValueError as error:
        raise InputError(f"--{error}") from None
    original = original_of(checkpoint, converted, base)
    model = swap.remove_layers(converted, original, indices)
    with new_folder(output, Path(checkpoint)) as work:
        model.save_pretrained(work)
        if (Path(checkpoint) / "recipe.yaml").is_file() and hasattr(model, "mxd_layers"):
            shutil.copyfile(Path(checkpoint) / "recipe.yaml", work / "recipe.yaml")  # evaluation takes its block length from it
        load_tokenizer(str(checkpoint)).save_pretrained(work)
        if hasattr(model, "mxd_layers"):
            write_labels(work, [label for label in read_labels(checkpoint) if label.layer not in indices])
        if (Path(checkpoint) / LOCAL).is_file() and hasattr(model, "mxd_layers"):
            write_json(work / LOCAL, {"base": base_of(checkpoint, base).model})
    return output
