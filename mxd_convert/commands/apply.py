"""`apply`: write the full checkpoint of a delta, bit for bit."""

import shutil
from pathlib import Path

from mxd_convert.base_model.load import stored_tensors
from mxd_convert.checkpoint.delta import FULL, base_of_delta, has_hash, merged_tensors, read_delta, weight_file
from mxd_convert.checkpoint.read import (
    LOCAL,
    check_new,
    new_folder,
    read_local,
)
from mxd_convert.errors import InputError
from mxd_convert.files import replacing, write_json


def apply(delta: str | Path, output: str | Path, base: str | None = None) -> Path:
    """Write the full checkpoint of a delta. Every file has the hash recorded when the delta was made.

    Args:
        delta: folder of the delta.
        output: folder to write.
        base: the base model, if it is not the recorded one.

    Returns:
        The checkpoint's folder.

    Raises:
        InputError: if the delta is damaged, `base` is not its base model, or `output` exists already.
    """
    folder, output = Path(delta), Path(output)
    check_new(output, folder)
    content = read_delta(folder)
    tensors = merged_tensors(folder, content, stored_tensors(base_of_delta(folder, content, base)))
    with new_folder(output, folder) as work:
        weights = {entry["path"]: entry["header"] for entry in content["weights"]}
        for path in content["files"]:
            (work / path).parent.mkdir(parents=True, exist_ok=True)
            if path in weights:
                with replacing(work / path) as temporary, temporary.open("wb") as file:
                    file.writelines(weight_file(weights[path], tensors))
            elif (folder / FULL / path).is_file():
                shutil.copyfile(folder / FULL / path, work / path)
        for path, digest in content["files"].items():
            if not has_hash(work / path, digest):
                raise InputError(
                    f"{folder}: damaged: the restored {path} doesn't have the recorded hash. Download the delta again."
                )
        if local := read_local(folder).get("base"):
            write_json(work / LOCAL, {"base": local})
    return output
