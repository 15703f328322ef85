"""The folder that a run works in, beside the one its result goes to, and the renaming of the one into the other.

Everything is written into `<output>.partial`, and the finished checkpoint is renamed from there, so a folder either holds a whole
result or is not there.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mxd_convert.checkpoint import REPORT, is_converted, read_local
from mxd_convert.data import local_files
from mxd_convert.errors import InputError
from mxd_convert.recipe import Recipe, is_local

MARK = "fingerprint"  # names the recipe, base and text that a work folder belongs to
REPLACING = "replacing"  # there while a finished output is made anew
SHARED = "processes"  # holds a run's word, which all its processes must see
TOLD = "told-"  # before that word: one of them has said why the run ended


class Workspace:
    """The output folder of a recipe and the work folder beside it. fresh: what is there may be replaced."""

    def __init__(self, recipe: Recipe, output: Path, fresh: bool) -> None:
        self.recipe, self.output, self.fresh = recipe, output, fresh
        self.work = output.parent / f"{output.name}.partial"

    def finished(self) -> dict[str, Any] | None:
        """The report of this very recipe's result, where it is there. Raises InputError where something else is in the way."""
        if not self.output.name:
            raise InputError(f"output.dir: {self.output} can't be the folder of a checkpoint; choose another output.dir")
        if self.output.is_file():
            raise InputError(f"output.dir: {self.output} is a file; choose another output.dir")
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
            content: dict[str, Any] = json.loads(report.read_text())
            content["recipe_sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(
                f"output.dir: {self.output} holds a checkpoint without a readable {REPORT}; choose another output.dir, or --fresh to replace it"
            ) from None
        if (self.work / REPLACING).is_file() and self._is_mine():  # cut off while it was done anew, with --fresh
            return None
        same = content.get("recipe_sha256") == self.recipe.published_sha256()
        local = read_local(self.output)  # base names alone can't tell two texts of the same name apart
        if not same or local.get("recipe", self.recipe.fingerprint()) != self.recipe.fingerprint():
            raise InputError(
                f"output.dir: {self.output} holds the result of another recipe; choose another output.dir, or --fresh to replace it"
            )
        return content

    def tidy(self) -> None:
        """Removes a work folder that a kill between the renaming and the tidying up has left, unless somebody works there."""
        if self.work.exists():
            with suppress(InputError), self.locked():
                _remove(self.work)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within it, no other run works on this output. The lock goes with the process, however it ends."""
        lock = FileLock(self.work / "lock", timeout=0)
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise InputError(
                f"output.dir: {self.output} is in use by another run; wait for it, or choose another output.dir"
            ) from None
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise InputError(f"output.dir: {error.filename or self.output} can't be written; choose another output.dir") from None
        try:
            yield
        finally:
            lock.release()

    def claim(self) -> None:
        """Makes the work folder this recipe's: cleared if `fresh`, refused where it belongs to another."""
        mark, ours = self.work / MARK, self._mark()
        theirs = mark.read_text() if mark.is_file() else ""
        if self.fresh:
            _clear(self.work, keep=("lock", MARK))
        elif self.has_state() and theirs and theirs != ours:
            same = theirs.splitlines()[0] == ours.splitlines()[0]
            what = "this recipe whose base or text has changed since" if same else "another recipe"
            raise InputError(
                f"output.dir: {self.work} holds an unfinished run of {what}; --fresh to start over, or choose another output.dir"
            )
        elif theirs != ours:
            shutil.rmtree(self.work / "data", ignore_errors=True)
        if theirs != ours or self.fresh:
            temporary = mark.with_suffix(".tmp")
            temporary.write_text(ours)
            temporary.replace(mark)
        if self.fresh and self.output.exists():
            (self.work / REPLACING).touch()

    def show(self, word: str) -> None:
        """Leaves the run's word for its other processes."""
        for old in self.work.glob(f"{TOLD}*"):
            old.unlink(missing_ok=True)
        (self.work / SHARED).write_text(word)

    def check_shown(self, word: str) -> None:
        """Raises InputError where this process does not see the word that another has left."""
        mark = self.work / SHARED
        if not mark.is_file() or mark.read_text() != word:
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
        """Removes the work folder of a run that failed before it had trained anything, so that it stands in nobody's way."""
        if not self.has_state():
            _remove(self.work)

    def publish(self, folder: Path) -> None:
        """Renames the finished checkpoint into place; an older result is kept until the new one is there."""
        os.umask(mask := os.umask(0))
        for path in folder.rglob("*"):
            if path.is_file():
                path.chmod(0o666 & ~mask)  # safetensors writes files that only their owner can read
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        aside = Path(tempfile.mkdtemp(dir=self.work))
        if self.output.exists():
            self.output.rename(aside / "old")
        folder.rename(self.output)
        _remove(self.work)

    def _is_mine(self) -> bool:
        """Whether the work folder is of this very recipe, base and text."""
        mark = self.work / MARK
        return mark.is_file() and mark.read_text() == self._mark()

    def _mark(self) -> str:
        return f"{self.recipe.fingerprint()}\n{self._inputs()}\n"

    def _inputs(self) -> str:
        """A hash over names, sizes and times of the local files that the run reads: told apart if they are changed in place."""
        data, base = self.recipe.data, self.recipe.base.model
        files = [path for path in (data.train.path, data.eval.path) if path is not None and is_local(path)]
        found = [file for path in files for file in local_files(path)]
        found += sorted(Path(base).glob("*.safetensors")) if is_local(base) else []
        return hashlib.sha256(
            json.dumps([[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in found]).encode()
        ).hexdigest()


def _is_ours(folder: Path) -> bool:
    """Whether a work folder is one of ours: it has our mark, or nothing but what comes before the mark."""
    before = {"lock", f"{MARK}.tmp", SHARED}
    return folder.is_dir() and (
        (folder / MARK).is_file() or all(path.name in before or path.name.startswith(TOLD) for path in folder.iterdir())
    )


def _clear(folder: Path, keep: tuple[str, ...]) -> None:
    for path in folder.iterdir():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _remove(work: Path) -> None:
    """Removes a work folder, the mark last but for the lock: cut off in between, what is left is still known as ours."""
    with suppress(OSError):
        _clear(work, keep=("lock", MARK))
        (work / MARK).unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)
