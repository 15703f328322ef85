"""The folder that a run works in, beside the one its result goes to, and the renaming of the one into the other.

Everything is written into `<output>.partial`, and the finished checkpoint is renamed from there, so a folder either holds a whole
result or is not there.
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
from mxd_convert.files import check_output, file_sha256, put_in_place, read_sealed, write_sealed, write_text
from mxd_convert.recipe.schema import Recipe, is_local

MARK = "fingerprint"  # names the recipe that a work folder belongs to, and what the files that the run reads hold
REPLACING = "replacing"  # there while a finished output is made anew
SHARED = "processes"  # holds a run's word, which all its processes must see
TOLD = "told-"  # before that word: one of them has said why the run ended
ASIDE = "aside"  # where an older result is while the new one takes its place
_DERIVED = ("offload", "checkpoint")  # made anew by every run
_KNOWN = {"lock", MARK, REPLACING, SHARED, ASIDE, *_DERIVED, "data", "state", "twin", "training_log.jsonl"}
_MUCH = 4 * 2**30  # bytes that take seconds to hash
# what lies in a model's folder and no loading reads
_NOT_LOADED = frozenset(
    {".bin", ".md", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".pdf", ".log", ".gguf", ".onnx", ".h5", ".msgpack"}
)


class Workspace:
    """The output folder of a recipe and the work folder beside it. fresh: what is there may be replaced."""

    def __init__(self, recipe: Recipe, output: Path, fresh: bool) -> None:
        self.recipe, self.output, self.fresh = recipe, output, fresh
        self.work = output.parent / f"{output.name}.partial"

    def finished(self) -> dict[str, Any] | None:
        """Return the report of this very recipe's result, where it is there. Raises InputError where something else is in the way."""
        check_output(self.output, "output.dir")
        with self._writable():
            return self._finished()

    def _finished(self) -> dict[str, Any] | None:
        if self.output.parent.is_dir() and not os.access(self.output.parent, os.W_OK):
            raise InputError(f"output.dir: {self.output.parent} can't be written; choose another output.dir")
        if self.work.exists() and not _is_ours(self.work):
            raise InputError(
                f"output.dir: {self.work}, where the run would work, holds something else; choose another output.dir"
            )
        if not self.output.exists() or not any(self.output.iterdir()):
            return None
        report = self.output / REPORT
        if not report.is_file() and not is_converted(self.output):
            raise InputError(
                f"output.dir: {self.output} holds something that is not a converted checkpoint; choose another output.dir"
            )
        if self.fresh:
            return None
        try:
            content: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
            content["recipe_sha256"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise InputError(
                f"output.dir: {self.output} holds a checkpoint without a readable {REPORT}; choose another output.dir, or --fresh to replace it"
            ) from None
        if (self.work / REPLACING).is_file() and self._may_be_mine():  # cut off while it was done anew, with --fresh
            return None
        same = content.get("recipe_sha256") == self.recipe.published_sha256()
        local = read_local(self.output)  # base names alone can't tell two texts of the same name apart
        if not same or local.get("recipe", self.recipe.fingerprint()) != self.recipe.fingerprint():
            raise InputError(
                f"output.dir: {self.output} holds the result of another recipe; choose another output.dir, or --fresh to replace it"
            )
        return content

    def tidy(self) -> None:
        """Remove a work folder that a kill between the renaming and the tidying up has left, unless somebody works there."""
        if self.work.exists():
            with suppress(InputError), self.locked():
                _remove(self.work)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other run from this output. The lock goes with the process, however it ends."""
        lock = FileLock(self.work / "lock", timeout=0)
        with disk_guard(self.work), self._writable():
            try:
                self.work.mkdir(parents=True, exist_ok=True)
                lock.acquire()
            except Timeout:
                raise InputError(
                    f"output.dir: {self.output} is in use by another run; wait for it, or choose another output.dir"
                ) from None
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _writable(self) -> Iterator[None]:
        """Turn a folder that can't be made, read or written into an InputError."""
        try:
            yield
        except OSError as error:
            if is_disk_full(error) or error.errno in (errno.EIO, errno.ENOMEM):
                raise
            place = error.filename or self.output
            raise InputError(f"output.dir: {place} can't be written ({error.strerror}); choose another output.dir") from None

    def claim(self, say: Callable[[str], None] = lambda line: None) -> None:
        """Make the work folder this recipe's: cleared if `fresh`, refused where it belongs to another or to other inputs.

        say: where to report that hashing the inputs takes a while.
        """
        self._put_back()
        mark, state = self.work / MARK, self.has_state() and not self.fresh
        theirs = read_sealed(mark)
        if state and theirs is None:
            raise self._refusal(f"an unfinished run whose file {MARK!r} is missing, damaged or of another version")
        if state and theirs is not None and theirs.get("recipe") != self.recipe.fingerprint():
            raise self._refusal("an unfinished run of another recipe")
        files = self.inputs(say)
        ours = {"recipe": self.recipe.fingerprint(), "files": files}
        if state and theirs is not None and theirs["files"] != files:
            raise self._refusal(
                f"an unfinished run of this recipe, and since it began {_changes(theirs['files'], files)}; put that right"
            )
        if self.fresh:
            _clear(self.work, keep=("lock", MARK) if mark.is_file() else ("lock",))
        elif theirs != ours:
            shutil.rmtree(self.work / "data", ignore_errors=True)
        if theirs != ours or self.fresh:
            write_sealed(mark, ours)
        if self.fresh and self.output.exists():
            (self.work / REPLACING).touch()
        self._remove_leftovers()

    def _refusal(self, what: str) -> InputError:
        return InputError(f"output.dir: {self.work} holds {what}; --fresh to start over, or choose another output.dir")

    def show(self, word: str) -> None:
        """Leave the run's word for its other processes."""
        for old in self.work.glob(f"{TOLD}*"):
            old.unlink(missing_ok=True)
        write_text(self.work / SHARED, word)

    def check_shown(self, word: str) -> None:
        """Raise InputError where this process does not see the word that another has left."""
        mark = self.work / SHARED
        if not mark.is_file() or mark.read_text(errors="replace") != word:
            raise InputError(
                f"output.dir: {self.output} is not on a file system that all processes see; choose another output.dir, on one that they do"
            )

    def first_to_tell(self, word: str) -> bool:
        """Whether this process, of those that found something wrong in the run of that word, is the first; it may speak."""
        try:
            (self.work / f"{TOLD}{word}").touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:
            return True
        return True

    def has_state(self) -> bool:
        """Whether anything has been trained here."""
        return any((self.work / "state").glob("*/step-*.json"))

    def forget(self) -> None:
        """Remove the work folder of a run that failed before it had trained anything, so that it stands in nobody's way."""
        if not self.has_state():
            self._put_back()
            _remove(self.work)

    def publish(self, folder: Path) -> None:
        """Rename the finished checkpoint to the output; an older result is kept until the new one is there."""
        check_output(self.output, "output.dir")  # nothing may have been mounted there in the meantime
        shutil.rmtree(self.work / ASIDE, ignore_errors=True)
        (self.work / ASIDE).mkdir()
        put_in_place(folder, self.output, self.work / ASIDE)
        (self.work / REPLACING).unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            (self.work / ASIDE / "old").rename(self.work / ASIDE / "replaced")  # never to be put back, once it is half removed
        _remove(self.work)

    def _put_back(self) -> None:
        """Return an older result to the output, where a kill came between the two renames of `publish`."""
        old = self.work / ASIDE / "old"
        if old.is_dir() and not self.output.exists():
            old.rename(self.output)

    def _remove_leftovers(self) -> None:
        """Remove what a killed process has left: half-written files, and what every run makes anew."""
        for name in (ASIDE, *_DERIVED):
            shutil.rmtree(self.work / name, ignore_errors=True)
        for path in self.work.rglob("*.tmp"):
            if not path.is_dir():
                path.unlink(missing_ok=True)

    def _may_be_mine(self) -> bool:
        """Whether the work folder is this recipe's, or can't be told to be another's."""
        mark = read_sealed(self.work / MARK)
        return mark is None or mark.get("recipe") == self.recipe.fingerprint()

    def inputs(self, say: Callable[[str], None] = lambda line: None) -> dict[str, str]:
        """Return the SHA-256 of every local file that the run reads, by path: texts, and the base's weights, config, tokenizer and code."""
        data, base = self.recipe.data, self.recipe.base.model
        texts = [path for path in (data.train.path, data.eval.path) if path is not None and is_local(path)]
        files = [file for path in texts for file in local_files(path)]
        if is_local(base):
            files += _loaded_files(Path(base), self.recipe.base.trust_remote_code or is_trusted())
        size = sum(file.stat().st_size for file in files)
        if size > _MUCH:
            say(f"hashing the base model and the text ({size / 2**30:,.1f} GiB)")
        return {str(file): _hash(file) for file in dict.fromkeys(files)}


def _loaded_files(folder: Path, trusted: bool) -> list[Path]:
    """Return the files that loading a model and its tokenizer may read. trusted: whether its own code, which may be in subfolders, is run."""
    found = [path for path in folder.iterdir() if path.suffix.lower() not in _NOT_LOADED]
    found += folder.glob("additional_chat_templates/*.jinja")
    if trusted:  # not what is in the folders of other models
        found += (path for path in folder.glob("*/**/*.py") if not (path.parent / "config.json").is_file())
    hidden = ("." in (part[0] for part in path.relative_to(folder).parts) for path in found)
    return sorted(path for path, is_hidden in zip(found, hidden, strict=True) if not is_hidden and path.is_file())


def _hash(file: Path) -> str:
    found = file.stat()
    return _hash_once(file, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))


@functools.lru_cache(maxsize=10_000)
def _hash_once(file: Path, stamp: tuple[int, ...]) -> str:
    """Hash a file once in a process, for the runs of a sweep read the same ones. stamp: changes with the file."""
    return file_sha256(file)


def _changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Say in words how two listings of files differ; they do."""
    words = [
        *(f"{name} has changed" for name in before if name in now and before[name] != now[name]),
        *(f"{name} has gone" for name in before if name not in now),
        *(f"{name} was added" for name in now if name not in before),
    ]
    return words[0] + (f" (and {len(words) - 1} more files)" if len(words) > 1 else "")


def _is_ours(folder: Path) -> bool:
    """Whether a work folder is one of ours: it has our mark, or nothing but what a run of ours leaves there."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    first = {
        name for name in names if name == "lock" or name.lstrip(".").startswith((MARK, SHARED, TOLD))
    }  # what comes before the mark
    known = {name for name in names if name in _KNOWN or name.endswith(".tmp")}
    return (folder / MARK).is_file() or names == first or ("lock" in names and names == first | known)


def _clear(folder: Path, keep: tuple[str, ...]) -> None:
    for path in folder.iterdir():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _remove(work: Path) -> None:
    """Remove a work folder, the mark last but for the lock: cut off in between, what is left is still known as ours."""
    with suppress(OSError):
        _clear(work, keep=("lock", MARK))
        (work / MARK).unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)
