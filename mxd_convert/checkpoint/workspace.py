"""The workspace of a run, and the rename of its finished checkpoint to the output folder.

A run writes everything into its workspace, `<output>.partial`, and renames the finished checkpoint from there. The output folder
therefore either has a complete result or does not exist.
"""

import errno
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mxd_convert.base_model.remote_code import is_trusted
from mxd_convert.checkpoint.read import REPORT, is_converted, read_local
from mxd_convert.data.documents import local_files
from mxd_convert.errors import InputError, disk_guard, is_disk_full
from mxd_convert.files import check_output, file_sha256, move_into_place, read_sealed, write_sealed, write_text
from mxd_convert.recipe.presets import is_warm
from mxd_convert.recipe.schema import Recipe
from mxd_convert.recipe.section import is_local

MARK = "fingerprint"  # file with the hashes of the recipe and of the files that the run reads
REPLACING = "replacing"  # file that exists while --fresh replaces a finished output
SHARED = "processes"  # file with the run id, which all processes of the run must see
REPORTED = "reported-"  # prefix of a file named by the run id, created by the process that reports why the run ended
ASIDE = "aside"  # folder of the previous result while the new one replaces it
_DERIVED = ("offload", "checkpoint")  # folders that every run creates again
_KNOWN = {"lock", MARK, REPLACING, SHARED, ASIDE, *_DERIVED, "data", "state", "twin", "training_log.jsonl"}
_LARGE_INPUT_BYTES = 4 * 2**30  # bytes; hashing more takes seconds and is reported
# suffixes of files in a model's folder that loading never reads
_NOT_LOADED = frozenset(
    {".bin", ".md", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".pdf", ".log", ".gguf", ".onnx", ".h5", ".msgpack"}
)


class Workspace:
    """The output folder of a recipe and the workspace beside it.

    fresh: whether an existing result or unfinished run may be replaced.
    """

    def __init__(self, recipe: Recipe, output: Path, fresh: bool) -> None:
        self.recipe, self.output, self.fresh = recipe, output, fresh
        self.folder = output.parent / f"{output.name}.partial"

    def finished(self) -> dict[str, Any] | None:
        """Return the report of this recipe's finished result, or None before it has finished.

        Raises InputError if the output or the workspace has something else, or can't be written.
        """
        check_output(self.output, "output.dir")
        with self._writable():
            return self._finished()

    def _finished(self) -> dict[str, Any] | None:
        if self.output.parent.is_dir() and not os.access(self.output.parent, os.W_OK):
            raise InputError(f"output.dir: {self.output.parent} can't be written. Choose another output.dir.")
        if self.folder.exists() and not _is_ours(self.folder):
            raise InputError(f"output.dir: {self.folder}, the workspace of the run, has other files. Choose another output.dir.")
        if not self.output.exists() or not any(self.output.iterdir()):
            return None
        report = self.output / REPORT
        if not report.is_file() and not is_converted(self.output):
            raise InputError(f"output.dir: {self.output} is not empty and not a converted checkpoint. Choose another output.dir.")
        if self.fresh:
            return None
        try:
            content: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
            content["recipe_sha256"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise InputError(
                f"output.dir: {self.output} has a checkpoint without a readable {REPORT}. Choose another output.dir, or replace it with --fresh."
            ) from None
        if (self.folder / REPLACING).is_file() and self._may_be_ours():  # a run with --fresh was interrupted
            return None
        same = content.get("recipe_sha256") == self.recipe.published_sha256()
        local = read_local(self.output)  # the published hash has only file names, so two texts of the same name look equal
        if not same or local.get("recipe", self.recipe.fingerprint()) != self.recipe.fingerprint():
            raise InputError(
                f"output.dir: {self.output} has the result of another recipe. Choose another output.dir, or replace it with --fresh."
            )
        return content

    def tidy(self) -> None:
        """Remove a workspace left by a kill between the rename and the clean-up, unless another run uses it."""
        if self.folder.exists():
            with suppress(InputError), self.locked():
                _remove(self.folder)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the output against other runs. The lock is released when the process ends, even if it is killed."""
        lock = FileLock(self.folder / "lock", timeout=0)
        with disk_guard(self.folder), self._writable():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock.acquire()
            except Timeout:
                raise InputError(
                    f"output.dir: {self.output} is in use by another run. Wait for it, or choose another output.dir."
                ) from None
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _writable(self) -> Iterator[None]:
        """Raise an InputError if a folder can't be created, read or written."""
        try:
            yield
        except OSError as error:
            if is_disk_full(error) or error.errno in (errno.EIO, errno.ENOMEM):
                raise
            path = error.filename or self.output
            raise InputError(f"output.dir: {path} can't be written ({error.strerror}). Choose another output.dir.") from None

    def claim(self, say: Callable[[str], None] = lambda line: None) -> None:
        """Prepare the workspace for this recipe, and clear it if `fresh`.

        say: called with a message if hashing the inputs takes seconds. Raises InputError if the workspace has an unfinished run
        of another recipe or of other inputs.
        """
        self._restore_previous()
        mark, state = self.folder / MARK, self.has_state() and not self.fresh
        theirs = read_sealed(mark)
        if state and theirs is None:
            raise self._refusal(f"an unfinished run whose file {MARK!r} is missing, damaged or of another version")
        if state and theirs is not None and theirs.get("recipe") != self.recipe.fingerprint():
            raise self._refusal("an unfinished run of another recipe")
        files = self.inputs(say)
        ours = {"recipe": self.recipe.fingerprint(), "files": files}
        if state and theirs is not None and theirs["files"] != files:
            raise self._refusal(
                f"an unfinished run of this recipe, but {_changes(theirs['files'], files)} since it began",
                "Undo that change, start over with --fresh, or choose another output.dir.",
            )
        if self.fresh:
            _clear(self.folder, keep=("lock", MARK) if mark.is_file() else ("lock",))
        elif theirs != ours:
            shutil.rmtree(self.folder / "data", ignore_errors=True)
        if theirs != ours or self.fresh:
            write_sealed(mark, ours)
        if self.fresh and self.output.exists():
            (self.folder / REPLACING).touch()
        self._remove_leftovers()

    def _refusal(self, what: str, fix: str = "Start over with --fresh, or choose another output.dir.") -> InputError:
        return InputError(f"output.dir: {self.folder} has {what}. {fix}")

    def write_run_id(self, run_id: str) -> None:
        """Write the run id to the workspace, for the other processes of the run."""
        for old in self.folder.glob(f"{REPORTED}*"):
            old.unlink(missing_ok=True)
        write_text(self.folder / SHARED, run_id)

    def check_run_id(self, run_id: str) -> None:
        """Raise InputError if this process does not see the run id that `write_run_id` has written in another process."""
        mark = self.folder / SHARED
        if not mark.is_file() or mark.read_text(errors="replace") != run_id:
            raise InputError(
                f"output.dir: {self.output} is not on a file system that all processes share. Choose an output.dir on a shared file system."
            )

    def first_to_report(self, run_id: str) -> bool:
        """Return whether this process is the first of the run to report why it ended. Only the first prints the message."""
        try:
            (self.folder / f"{REPORTED}{run_id}").touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:
            return True
        return True

    def has_state(self) -> bool:
        """Return whether the workspace has a saved training state."""
        return any((self.folder / "state").glob("*/step-*.json"))

    def remove_if_untrained(self) -> None:
        """Remove the workspace if no training state was saved, so that a failed run doesn't block the output."""
        if not self.has_state():
            self._restore_previous()
            _remove(self.folder)

    def publish(self, folder: Path) -> None:
        """Rename the finished checkpoint to the output. A previous result is kept until the rename has succeeded."""
        check_output(self.output, "output.dir")  # something may have been mounted there since the first check
        shutil.rmtree(self.folder / ASIDE, ignore_errors=True)
        (self.folder / ASIDE).mkdir()
        move_into_place(folder, self.output, self.folder / ASIDE)
        (self.folder / REPLACING).unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            (self.folder / ASIDE / "old").rename(
                self.folder / ASIDE / "replaced"
            )  # so that `_restore_previous` can't restore it half removed
        _remove(self.folder)

    def _restore_previous(self) -> None:
        """Move a previous result back to the output if a kill came between the two renames of `publish`."""
        old = self.folder / ASIDE / "old"
        if old.is_dir() and not self.output.exists():
            old.rename(self.output)

    def _remove_leftovers(self) -> None:
        """Remove what a killed process has left: partly written files, and folders that every run creates again."""
        for name in (ASIDE, *_DERIVED):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for path in self.folder.rglob("*.tmp"):
            if not path.is_dir():
                path.unlink(missing_ok=True)

    def _may_be_ours(self) -> bool:
        """Return whether the workspace is not known to belong to another recipe."""
        mark = read_sealed(self.folder / MARK)
        return mark is None or mark.get("recipe") == self.recipe.fingerprint()

    def inputs(self, say: Callable[[str], None] = lambda line: None) -> dict[str, str]:
        """Return the SHA-256 of every local file that the run reads, by path.

        These are the texts, the base's weights, config, tokenizer and code, and the checkpoint of a warm start. say: as for `claim`.
        """
        data, base, init = self.recipe.data, self.recipe.base.model, self.recipe.train.init
        texts = [source.path for text in (data.train, data.eval) for _, source in text.entries() if is_local(source.path)]
        files = [file for path in texts for file in local_files(path)]
        if self.recipe.base.gguf_file is not None and is_local(base):
            files.append(Path(self.recipe.base.path))
        elif is_local(base):
            files += _loaded_files(Path(base), self.recipe.base.trust_remote_code or is_trusted())
        if init is not None and is_warm(init):
            files += _loaded_files(Path(init), trusted=False)
        size = sum(file.stat().st_size for file in files)
        if size > _LARGE_INPUT_BYTES:
            say(f"hashing the base model and the text ({size / 2**30:,.1f} GiB)")
        return {str(file): _hash(file) for file in dict.fromkeys(files)}


def _loaded_files(folder: Path, trusted: bool) -> list[Path]:
    """Return the files that loading a model and its tokenizer may read. trusted: whether to include code in subfolders."""
    found = [path for path in folder.iterdir() if path.suffix.lower() not in _NOT_LOADED]
    found += folder.glob("additional_chat_templates/*.jinja")
    if trusted:  # subfolders with a config.json are other models
        found += (path for path in folder.glob("*/**/*.py") if not (path.parent / "config.json").is_file())
    hidden = ("." in (part[0] for part in path.relative_to(folder).parts) for path in found)
    return sorted(path for path, is_hidden in zip(found, hidden, strict=True) if not is_hidden and path.is_file())


def _hash(file: Path) -> str:
    found = file.stat()
    return _hash_once(file, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))


@functools.lru_cache(maxsize=10_000)
def _hash_once(file: Path, stamp: tuple[int, ...]) -> str:
    """Return the SHA-256 of a file, cached because the runs of a sweep read the same files. stamp: changes with the file."""
    return file_sha256(file)


def _changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return a description of how two different listings of files differ."""
    changes = [
        *(f"{name} has changed" for name in before if name in now and before[name] != now[name]),
        *(f"{name} was removed" for name in before if name not in now),
        *(f"{name} was added" for name in now if name not in before),
    ]
    return changes[0] + (f" (and {len(changes) - 1} more files)" if len(changes) > 1 else "")


def _is_ours(folder: Path) -> bool:
    """Return whether a folder is a workspace: it has the mark, or only files that a run creates before the mark."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    # files that are created before the mark
    first = {name for name in names if name == "lock" or name.lstrip(".").startswith((MARK, SHARED, REPORTED))}
    known = {name for name in names if name in _KNOWN or name.endswith(".tmp")}
    return (folder / MARK).is_file() or names == first or ("lock" in names and names == first | known)


def _clear(folder: Path, keep: tuple[str, ...]) -> None:
    for path in folder.iterdir():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _remove(work: Path) -> None:
    """Remove a workspace, its mark and lock last, so that an interrupted removal still leaves a known workspace."""
    with suppress(OSError):
        _clear(work, keep=("lock", MARK))
        (work / MARK).unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)
