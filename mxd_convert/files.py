"""Atomic writes of files and folders, and reads of untrusted files with one-line errors.

The package writes every file through `replacing` or a function built on it, and every output folder in a `temporary_sibling`.
Neither leaves temporary files after an error or a signal. After a SIGKILL, the next call removes them.
"""

import csv
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mxd_convert.errors import InputError, disk_guard
from mxd_convert.escaping import csv_cell

MAX_JSON_BYTES = 256 * 2**20  # bytes; parsing a larger JSON file would take gigabytes of memory
_SEAL = "seal"  # key of the checksum in a sealed file
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]
_OWNED = re.compile(rf"-{_HOST}\.(\d+)\.[^.]+(\.tmp)?$")
os.umask(_UMASK := os.umask(0))
_MODE = 0o666 & ~_UMASK
_NUMBERS = re.compile(r"\[\n\s+((?:-?[0-9][0-9.e+-]*,?\s+)+)\]")  # a list of numbers in indented JSON; no string has a line break

# --- writing a file ---------------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling, which is renamed to `path` if the block succeeds and removed otherwise.

    A symbolic link at `path` is replaced; its target is not changed. Raises InputError if the disk is full.
    """
    with disk_guard(path):
        scratch = _in_scratch(path)
        if not scratch:
            _remove_leftovers(path.parent, path.name)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path.name), suffix=".tmp")
        os.close(descriptor)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(_MODE)  # mkstemp and safetensors create files that only the owner can read
            if scratch:  # `move_into_place` syncs the whole folder at once
                temporary.replace(path)
                return
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a strict JSON file, with null for numbers that are not finite. A list of numbers is one line."""
    text = json.dumps(finite(content), indent=2, allow_nan=False)
    write_text(path, _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV file with a header. `csv_cell` escapes text that a spreadsheet would run as a formula."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(map(csv_cell, columns))
        writer.writerows([csv_cell(row.get(column)) for column in columns] for row in rows)


def finite(content: Any) -> Any:
    """Return `content` with None for every NaN or infinite float, which JSON can't represent."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return content


# --- writing a folder -------------------------------------------------------------------------------------------------------------


@contextmanager
def temporary_sibling(output: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `output`, on the same disk, and remove it at the end.

    Folders left by killed processes are removed first. Raises InputError if the disk is full or the folder can't be created.
    """
    with disk_guard(output):
        created = [folder for folder in output.parents if not folder.exists()]  # innermost first
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(output.parent, output.name)
            scratch = Path(tempfile.mkdtemp(dir=output.parent, prefix=_prefix(output.name)))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG):
                raise InputError(f"{output}: can't be written ({error.strerror}). Choose another folder.") from None
            raise
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            with suppress(OSError):  # stops at the first folder that is not empty
                for folder in created:
                    folder.rmdir()


def check_output(output: Path, name: str = "--output") -> None:
    """Raise InputError if `output` is a file or a mount point, to which no folder can be renamed.

    name: the option or recipe key that the message names.
    """
    another = "folder" if name.startswith("--") else name
    if not output.name:
        raise InputError(f"{name}: {output} has no name of its own. Choose another {another}, such as {output / 'mxd'}.")
    if _is_mount(output):
        raise InputError(
            f"{name}: {output} is a mount point, to which no folder can be renamed. Choose a folder inside it, such as {output / 'mxd'}."
        )
    if os.path.lexists(output) and not output.is_dir():
        raise InputError(f"{name}: {output} is a file. Choose another {another}.")


def _is_mount(path: Path) -> bool:
    """Return whether `path` is a mount point, including bind mounts from the same disk, which `os.path.ismount` misses."""
    with suppress(OSError):
        if os.path.ismount(path):
            return True
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return str(path.resolve()) in {line.split()[4].replace("\\040", " ") for line in mounts}
    return False


def move_into_place(folder: Path, output: Path, scratch: Path) -> None:
    """Rename a finished folder to `output`.

    An existing `output` is first moved into `scratch`, and moved back if the rename fails.
    """
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        path.chmod(_MODE)
    with ThreadPoolExecutor(16) as pool:  # syncing thousands of small files one by one takes half a minute
        list(pool.map(_sync, files))
    old = scratch / "old"
    if output.exists():
        output.rename(old)
    try:
        folder.rename(output)
    except BaseException:
        if old.exists() and not output.exists():
            old.rename(output)
        raise
    _sync(output.parent)


# --- reading ----------------------------------------------------------------------------------------------------------------------


def read_json(path: Path, fix: str = "Download it or convert again.") -> Any:
    """Return the content of an untrusted JSON file.

    fix: the last sentence of the error message. Raises InputError if the file is missing, too large or invalid.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(
                f"{path}: {path.stat().st_size / 2**20:,.0f} MiB, more than the limit of {MAX_JSON_BYTES // 2**20} MiB. {fix}"
            )
        check_pointer(path)
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror or error}). {fix}") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply to be read. {fix}") from None
    except ValueError as error:
        raise InputError(f"{path}: not readable JSON ({_reason(error)}). {fix}") from None


def read_mapping(path: Path, fix: str = "Download it or convert again.") -> dict[str, Any]:
    """Return the content of a JSON file whose top level is a mapping. Raises InputError as `read_json` does."""
    content = read_json(path, fix)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds {kind_of(content)}; expected a mapping. {fix}")
    return content


def check_links(folder: Path) -> None:
    """Raise InputError if a symbolic link in `folder` is broken or points out of the folder.

    Publishing or copying such a folder would include the link's target, and writing into it would overwrite the target. The links
    of the Hub's cache, from a snapshot to the blobs beside it, are accepted.
    """
    inside = [folder.resolve()]
    inside += [parent.parent / "blobs" for parent in folder.resolve().parents if parent.name == "snapshots"]
    for path in _links(folder):
        target = path.resolve()
        if not path.exists() or not any(target.is_relative_to(allowed) for allowed in inside):
            raise InputError(
                f"{path}: a symbolic link to {os.readlink(path)}, outside of the folder. Replace the link by the file, or remove it."
            )


def _links(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        yield from (Path(parent, name) for name in sorted([*folders, *files]) if Path(parent, name).is_symlink())


def check_pointer(path: Path) -> None:
    """Raise InputError if a file is a Git LFS pointer, whose content was not downloaded."""
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs.github.com/spec"):
            raise InputError(f"{path}: a Git LFS pointer, not the file. Run `git lfs pull` in that folder to download it.")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder, after waiting for other processes.

    The lock is on the folder itself: it leaves no file, and is released when the process ends.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kind_of(content: Any) -> str:
    """Return the kind of a value read from JSON for an error message, such as `a list` or `a number`."""
    names = {dict: "a mapping", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(content), "nothing" if content is None else f"a {type(content).__name__}")


# --- leftovers --------------------------------------------------------------------------------------------------------------------


def _prefix(name: str) -> str:
    """Return the prefix of the temporary name of `name`. It contains the process id, by which leftovers are found."""
    return f".{name[:100]}-{_HOST}.{os.getpid()}."


def _remove_leftovers(folder: Path, name: str) -> None:
    """Remove temporary files and folders of `name` that ended processes of this machine have left."""
    prefix = f".{name[:100]}"
    for path in folder.glob(f"{prefix.translate(_LITERAL)}-{_HOST}.*"):
        owner = _OWNED.fullmatch(path.name[len(prefix) :])
        if owner is not None and not _runs(int(owner[1])):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


_LITERAL = str.maketrans({sign: f"[{sign}]" for sign in "*?["})


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # raised by file systems without fsync
            raise
    finally:
        os.close(descriptor)


def _in_scratch(path: Path) -> bool:
    return any(_OWNED.search(part) and part.startswith(".") for part in path.parent.parts)


def _reason(error: ValueError) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error).splitlines()[0][:120]


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file with a checksum of its content, so that `read_sealed` detects damage."""
    content = json.loads(json.dumps(finite(content)))  # the checksum is of the content as read back
    write_json(path, {**content, _SEAL: _checksum(content)})


def read_sealed(path: Path) -> dict[str, Any] | None:
    """Return the content of a sealed file, or None if it is missing, damaged or not sealed."""
    try:
        content = read_mapping(path)
    except InputError:
        return None
    seal = content.pop(_SEAL, None)
    return content if seal == _checksum(content) else None


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_free_space(folder: Path, needed: int, what: str, fix: str = "") -> None:
    """Raise InputError if the disk of `folder`, which need not exist yet, has less than `needed` bytes free.

    what: begins the message, such as `output.dir: runs/x: the run`. fix: ends it, after "Free some space".
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if needed > free:
        sizes = [f"{size / 2**30:,.1f} GiB" if needed >= 2**30 else f"{size / 2**20:,.0f} MiB" for size in (needed, free)]
        raise InputError(f"{what} needs about {sizes[0]} of disk space, and {sizes[1]} are free. Free some space{fix}.")
