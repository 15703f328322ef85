"""What a run needs to go on where it stopped: one safetensors file and a JSON file beside it, whole or not there.

The tensors are written first, under a temporary name, then the JSON with their checksum; the state before is kept until the new
one is whole, and is used where the newest turns out to be damaged. No pickle.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from mxd_convert.errors import disk_guard
from mxd_convert.training.log import NAME, split_log

_REMOVED = "removed-"


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _settle(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def save_state(folder: Path, step: int, tensors: dict[str, Tensor], facts: dict[str, Any], fingerprint: str) -> None:
    """Writes the state after `step` steps; deletes all but the one before it. Raises InputError when the disk is full."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:09d}.safetensors"
    temporary = path.with_suffix(".tmp")
    with disk_guard(folder):
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
            _settle(temporary)
            temporary.replace(path)
            note = {**facts, "step": step, "sha256": _checksum(path), "fingerprint": fingerprint}
            temporary.write_text(json.dumps(note))
            _settle(temporary)
            temporary.replace(path.with_suffix(".json"))
        finally:
            temporary.unlink(missing_ok=True)
    before = [other.stem for other in sorted(folder.glob("step-*.json")) if other.stem < path.stem][-1:]
    for other in sorted(folder.glob("step-*")):  # also what a kill has left half-written
        if other.stem not in (path.stem, *before):
            other.unlink(missing_ok=True)


def load_state(folder: Path, fingerprint: str) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """The newest whole state of the run with this fingerprint: (steps done, tensors, facts); None where there is none."""
    for note_path in sorted(folder.glob("step-*.json"), reverse=True):
        path, note = note_path.with_suffix(".safetensors"), _note(note_path, fingerprint)
        try:
            if note is not None and _checksum(path) == note["sha256"]:
                return note["step"], load_file(path), note
        except (OSError, ValueError, KeyError):  # damaged: the one before it is tried
            continue
    return None


def _note(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """A state's note, if it is whole and of this run."""
    try:
        note = json.loads(path.read_text())
        return note if note["fingerprint"] == fingerprint and {"step", "sha256"} <= note.keys() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def groups_with_state(root: Path, fingerprint: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folders under `root` that hold a state of this run, each with the newest state's note, in the order of their layers."""
    found = []
    for folder in root.glob("layers-*"):
        notes = [note for path in sorted(folder.glob("step-*.json")) if (note := _note(path, fingerprint)) is not None]
        if notes:
            found.append((folder, notes[-1]))
    yield from sorted(found, key=lambda group: group[1]["layers"])


def split_state(folder: Path, parts: dict[Path, list[int]], fingerprint: str) -> None:
    """Makes several states out of that of a group of layers, each for some of them in a folder of its own, and removes the group's.

    parts: layer indices by folder. Cut off in between, the group's state is still there and is split again. The time it took is
    shared out by the number of layers.
    """
    found = load_state(folder, fingerprint)
    assert found is not None
    step, tensors, facts = found
    for part, indices in parts.items():
        shutil.rmtree(part, ignore_errors=True)
        prefixes = tuple(f"{index}/" for index in indices)
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}
        part.mkdir(parents=True)
        split_log(folder / NAME, part / NAME, indices)
        share = len(indices) / len(facts["layers"])
        save_state(part, step, own, {**facts, "layers": indices, "seconds": share * facts["seconds"]}, fingerprint)
    remove_state(folder)


def remove_state(folder: Path) -> None:
    """Removes a group's state: in one moment, whatever cuts it off."""
    aside = folder.with_name(f"{_REMOVED}{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(root: Path) -> None:
    """What a removal that was cut off has left."""
    for folder in root.glob(f"{_REMOVED}*"):
        shutil.rmtree(folder, ignore_errors=True)
