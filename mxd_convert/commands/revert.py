"""`revert`: a copy of a checkpoint in which chosen layers have their original MLPs again."""

import shutil
from pathlib import Path

from mxd_convert.base_model import swap
from mxd_convert.base_model.load import copy_processor, load_tokenizer
from mxd_convert.checkpoint.labels import read_labels, write_labels
from mxd_convert.checkpoint.read import LOCAL, base_of, check_new, load_checkpoint, new_folder, original_of
from mxd_convert.errors import InputError
from mxd_convert.files import write_json
from mxd_convert.recipe.schema import layer_indices


def revert(checkpoint: str | Path, layers: list[int] | str, output: str | Path, base: str | None = None) -> Path:
    """Write a copy of a checkpoint in which the given layers have their original MLPs again.

    If all layers are reverted, the copy is a checkpoint of the base model's own class. It has no mxd_report.json, because the old
    figures don't apply to it.

    Args:
        checkpoint: Folder of the converted checkpoint.
        layers: Layer indices: [3, 4], "3,4", "0-2" or "all".
        output: Folder to write, new or empty.
        base: Base model to use instead of the recorded one.

    Returns:
        The folder written.

    Raises:
        InputError: The checkpoint, layers, base model or output folder can't be used.
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
            shutil.copyfile(Path(checkpoint) / "recipe.yaml", work / "recipe.yaml")  # evaluation reads the block length from it
        load_tokenizer(str(checkpoint)).save_pretrained(work)
        copy_processor(str(checkpoint), work)
        if hasattr(model, "mxd_layers"):
            write_labels(work, [label for label in read_labels(checkpoint) if label.layer not in indices])
        if (Path(checkpoint) / LOCAL).is_file() and hasattr(model, "mxd_layers"):
            write_json(work / LOCAL, {"base": base_of(checkpoint, base).path})
    return output
