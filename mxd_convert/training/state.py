"""What a run needs to go on where it stopped: one safetensors file and a JSON file beside it, whole or not there.

The tensors are written first, under a temporary name, then the JSON with their checksum; the state before is kept until the new
one is whole, and is used where the newest turns out to be damaged. No pickle.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from mxd_convert.errors import disk_guard


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
            note = {"step": step, "sha256": _checksum(path), "fingerprint": fingerprint, **facts}
            temporary.write_text(json.dumps(note))
            _settle(temporary)
            temporary.replace(path.with_suffix(".json"))
        finally:
            temporary.unlink(missing_ok=True)
    for old in sorted(folder.glob("step-*.json"))[:-2]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)


def load_state(folder: Path, fingerprint: str) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """The newest whole state of the run with this fingerprint: (steps done, tensors, facts); None where there is none."""
    for note_path in sorted(folder.glob("step-*.json"), reverse=True):
        path = note_path.with_suffix(".safetensors")
        try:
            note = json.loads(note_path.read_text())
            if note["fingerprint"] == fingerprint and _checksum(path) == note["sha256"]:
                return note["step"], load_file(path), note
        except (OSError, ValueError, KeyError):  # damaged: the one before it is tried
            continue
    return None


def finished_states(root: Path, fingerprint: str) -> Iterator[tuple[Path, dict[str, Tensor], dict[str, Any]]]:
    """The states under `root` of layers trained to the end: (folder, tensors, facts), in the order of their layers."""
    found = []
    for folder in root.glob("layers-*"):
        notes = [json.loads(path.read_text()) for path in sorted(folder.glob("step-*.json"))[-1:]]
        if notes and notes[0]["step"] == notes[0]["steps"] and (state := load_state(folder, fingerprint)) is not None:
            step, tensors, facts = state
            if step == facts["steps"]:
                found.append((folder, tensors, facts))
    yield from sorted(found, key=lambda state: state[2]["layers"])
