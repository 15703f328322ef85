"""The saved state of a run: a safetensors file and a JSON note with checksums, so that damage is detected.

The tensors are written first, then the note with three checksums: of the tensors, of the log up to then, and its own. The
previous state is kept, and is used if the newest is damaged. No pickle.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mxd_convert.files import file_sha256, read_sealed, replacing, write_sealed
from mxd_convert.training.log import NAME, cut_log, is_whole, log_extent, split_log

_REMOVED = "removed-"


def save_state(folder: Path, step: int, tensors: dict[str, Tensor], facts: dict[str, Any], fingerprint: str) -> None:
    """Write the state after `step` steps and delete all but the previous one. Raises InputError if the disk is full."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:09d}.safetensors"
    with replacing(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
    note = {**facts, "step": step, "sha256": file_sha256(path), "log": log_extent(folder / NAME), "fingerprint": fingerprint}
    write_sealed(path.with_suffix(".json"), note)
    before = [other.stem for other in sorted(folder.glob("step-*.json")) if other.stem < path.stem][-1:]
    for other in sorted(folder.glob("step-*")):  # also tensors without a note, left by a kill
        if other.stem not in (path.stem, *before):
            other.unlink(missing_ok=True)


def load_state(folder: Path, fingerprint: str) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """Return the newest undamaged state of the run with this fingerprint: (steps done, tensors, facts), or None."""
    for note_path in sorted(folder.glob("step-*.json"), reverse=True):
        path, note = note_path.with_suffix(".safetensors"), _note(note_path, fingerprint)
        try:
            if note is not None and file_sha256(path) == note["sha256"] and is_whole(folder / NAME, note["log"]):
                return note["step"], load_file(path), note
        except (OSError, SafetensorError):  # damaged: try the previous one
            continue
    return None


def drop_damaged(folder: Path, step: int) -> list[Path]:
    """Remove the states after `step`, which `load_state` has skipped as damaged. Returns the paths of their notes."""
    name = f"step-{step:09d}"
    damaged = [path for path in sorted(folder.glob("step-*")) if path.stem > name]
    for path in damaged:
        path.unlink(missing_ok=True)
    return [path for path in damaged if path.suffix == ".json"]


def _note(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """Return the note of a state, or None if it is damaged or of another run."""
    note = read_sealed(path)
    return note if note is not None and note.get("fingerprint") == fingerprint else None


def groups_with_state(root: Path, fingerprint: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the folders under `root` with a state of this run and their newest undamaged notes, in the order of their layers."""
    found = []
    for folder in root.glob("layers-*"):
        notes = [note for path in sorted(folder.glob("step-*.json")) if (note := _note(path, fingerprint)) is not None]
        if notes:
            found.append((folder, notes[-1]))
    yield from sorted(found, key=lambda group: group[1]["layers"])


def split_state(folder: Path, subgroups: dict[Path, list[int]], fingerprint: str) -> None:
    """Split the state of a group of layers into one state per subgroup, and remove the group's.

    The group's state is removed last, so that an interrupted split can be repeated. The training time is divided in proportion to
    the number of layers. subgroups: layer indices by folder.
    """
    found = load_state(folder, fingerprint)
    assert found is not None
    step, tensors, facts = found
    cut_log(folder / NAME, facts["log"])
    for target, indices in subgroups.items():
        shutil.rmtree(target, ignore_errors=True)
        prefixes = tuple(f"{index}/" for index in indices)
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}
        target.mkdir(parents=True)
        split_log(folder / NAME, target / NAME, indices)
        share = len(indices) / len(facts["layers"])
        save_state(target, step, own, {**facts, "layers": indices, "seconds": share * facts["seconds"]}, fingerprint)
    remove_state(folder)


def remove_state(folder: Path) -> None:
    """Remove the state of a group. It is renamed first, so that an interruption leaves no partial state."""
    aside = folder.with_name(f"{_REMOVED}{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(root: Path) -> None:
    """Remove the folders that interrupted calls of `remove_state` have left."""
    for folder in root.glob(f"{_REMOVED}*"):
        shutil.rmtree(folder, ignore_errors=True)
