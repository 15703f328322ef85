"""Fetch the tests that other libraries publish in their source archives, and make them importable. Nothing of theirs is kept here."""

import importlib.machinery
import re
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

LARGEST = 64 * 1024 * 1024  # bytes of all unpacked files of one archive; today's hold 2


class FetchError(Exception):
    """An archive can't be downloaded or is not what was asked for."""


def tests_of(library: str, cache: Path) -> Path:
    """Return the folder of the installed version's own tests; download and unpack them if they aren't in the cache.

    Raises FetchError.
    """
    installed = version(library)
    folder = cache / f"{library}-{installed}"
    if not (folder / "tests").is_dir():
        archive = _archive(library, installed, cache)
        partial = folder.with_name(f"{folder.name}.partial")
        _unpack(archive, f"{library}-{installed}", partial)
        partial.rename(folder)
    return folder / "tests"


def packages(cache: Path, *names: str) -> Path:
    """Return a folder with packages that the tests import and this environment may lack; install them if they aren't in the cache."""
    folder = cache / "site-packages"
    missing = [name for name in names if not (folder / name).is_dir()]
    if missing:
        _pip("install", "--no-deps", "--target", str(folder), *missing)
    return folder


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        problem = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise FetchError(f"pip {' '.join(arguments)}: {problem}")


def _archive(library: str, wanted: str, cache: Path) -> Path:
    """Download a source archive through pip, which knows the index of this environment."""
    archive = cache / f"{library}-{wanted}.tar.gz"
    if not archive.is_file():
        requirement = f"{library}=={wanted}"
        # pip builds the archive's metadata, for which its build backend (setuptools) has to be there
        _pip("download", "--no-deps", "--no-binary", library, "--dest", str(cache), requirement)
        if not archive.is_file():
            raise FetchError(f"pip downloaded no {archive.name} for {requirement}.")
    return archive


def _unpack(archive: Path, top: str, target: Path) -> None:
    """Write the archive's tests, and nothing else of it, to `target`. Raises FetchError for another version."""
    with tarfile.open(archive) as opened:
        information = opened.extractfile(f"{top}/PKG-INFO")
        text = information.read().decode() if information else ""
        found = re.search(r"^Version: (\S+)$", text, flags=re.MULTILINE)
        if found is None or not top.endswith(f"-{found[1]}"):
            raise FetchError(f"{archive}: its version is {found[1] if found else 'missing'}, not that of {top}. Delete it.")
        members = [member for member in opened if member.isfile() and member.name.startswith(f"{top}/tests/")]
        if sum(member.size for member in members) > LARGEST:
            raise FetchError(f"{archive}: its tests are larger than {LARGEST} bytes.")
        for member in members:
            member.name = member.name.removeprefix(f"{top}/")
            opened.extract(member, target, filter="data")  # refuses paths that leave the target
    (target / "tests" / "__init__.py").touch()


def importable(package: str, folder: Path, stand_ins: Mapping[str, Mapping[str, Any]]) -> None:
    """Make `folder` the package of that name, with stand-ins for modules that the archive lacks.

    stand_ins: by name relative to the package (absolute with a leading dot), what each module holds.
    """
    module = ModuleType(package)
    module.__path__ = [str(folder)]
    module.__spec__ = importlib.machinery.ModuleSpec(package, None, is_package=True)
    sys.modules[package] = module
    for name, content in stand_ins.items():
        full = name[1:] if name.startswith(".") else f"{package}.{name}"
        if full in sys.modules or (not name.startswith(".") and (folder / f"{name.replace('.', '/')}.py").is_file()):
            continue
        made = ModuleType(full)
        made.__spec__ = importlib.machinery.ModuleSpec(full, None)
        vars(made).update(content)
        sys.modules[full] = made
