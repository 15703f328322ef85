"""`verify --provenance`: recompute the hashes that a checkpoint's report records for its files, recipe, base and texts."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mxd_convert.base_model.load import load_base, load_tokenizer, model_sha256
from mxd_convert.checkpoint.labels import LABELS
from mxd_convert.checkpoint.read import REPORT, base_of, belonging, read_config, read_report, recorded_base
from mxd_convert.checkpoint.texts import recorded_data
from mxd_convert.checkpoint.verify import Check, Verification, foreign_code
from mxd_convert.data.blocks import prepare
from mxd_convert.errors import InputError, first_line
from mxd_convert.files import file_sha256
from mxd_convert.recipe.load import read_recipe_yaml
from mxd_convert.recipe.schema import RENAMED, Recipe
from mxd_convert.report.schema import Report

_WITHOUT_HASH = ("README.md", REPORT, LABELS)  # the card, made from the report; the report itself; and labels, which users add


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of a checkpoint's files by path, without the dashboard and files written after the report."""
    return {path: file_sha256(folder / path) for path in belonging(folder) if path not in _WITHOUT_HASH}


def changed_files(folder: Path, report: Report | None) -> list[str]:
    """Return the paths of files that have changed or are missing since the report was measured. Empty if it records no hashes."""
    recorded = (report and report.files) or {}
    return [path for path, digest in recorded.items() if not (folder / path).is_file() or file_sha256(folder / path) != digest]


def verify_provenance(checkpoint: str | Path, base: str | None = None) -> Verification:
    """Return whether files, recipe, seed, base and texts match the report. What is not available is reported as not checked.

    base: the base model, if not the recorded one. Texts are read from their original paths, if the run was on this machine.
    Raises InputError if `checkpoint` is not a converted checkpoint.
    """
    folder = Path(checkpoint)
    config = read_config(folder)
    if not (folder / REPORT).is_file():
        missing = f"no {REPORT}: the checkpoint was changed after its conversion and not evaluated since"
        return Verification(folder, [Check("the report is there", None, missing)])
    checks: list[Check] = []
    try:
        report = read_report(folder)
        assert report is not None
        for found in (
            _files(folder, report),
            _recipe(folder, report),
            _base(folder, config, report, base),
            _texts(folder, report),
        ):
            checks += found
    except InputError as error:
        if base is not None and not str(error).startswith(str(folder)):
            raise
        checks.append(Check("the report can be read", False, first_line(error)))
    return Verification(folder, checks)


def _files(folder: Path, report: Report) -> Iterator[Check]:
    name = "files are those that were measured, by SHA-256"
    if not report.files:
        yield Check(name, None, "the report has no hashes of them")
        return
    wrong = changed_files(folder, report)
    yield Check(
        name,
        not wrong,
        f"{wrong[0]} differs or is missing" + (f", and {len(wrong) - 1} more" if wrong[1:] else "") if wrong else "",
    )
    if more := [path for path in belonging(folder) if path not in report.files and path not in _WITHOUT_HASH]:
        yield Check(
            "there are no other files", None, f"the report does not list {', '.join(more[:3])}" + (", ..." if more[3:] else "")
        )
    other = foreign_code(folder)
    version = (report.versions or {}).get("mxd-convert", "unknown")
    why = f"{other[0]} is not this package's own. The checkpoint was made by version {version}." if other else ""
    yield Check("its code is this package's own", None if other else True, why)


def _recipe(folder: Path, report: Report) -> Iterator[Check]:
    name = "recipe.yaml is the recipe that the report names, by SHA-256"
    try:
        recipe = Recipe(**read_recipe_yaml(folder / "recipe.yaml"))
    except (InputError, ValidationError, TypeError) as error:
        old = isinstance(error, ValidationError) and _old_keys(error)
        why = (
            f"it was written by an earlier version of mxd-convert ({old})"
            if old
            else f"recipe.yaml can't be read ({first_line(error)})"
        )
        yield Check(name, None if old else False, why)
        return
    same = recipe.published_sha256() == report.recipe_sha256
    yield Check(name, same, "" if same else "the hash of recipe.yaml differs")
    seed = (report.seeds or {}).get("train")
    yield Check(
        "the seed is the recipe's",
        seed == recipe.train.seed,
        "" if seed == recipe.train.seed else f"the report has {seed}, the recipe {recipe.train.seed}",
    )


def _old_keys(error: ValidationError) -> str:
    """Return the keys of the error that an earlier version used, or "" if it has other problems too."""
    keys = [".".join(map(str, problem["loc"])) for problem in error.errors(include_url=False)]
    return ", ".join(keys) if set(keys) <= RENAMED.keys() else ""


def _base(folder: Path, config: Any, report: Report, base: str | None) -> Iterator[Check]:
    recorded = report.base
    same = recorded_base(config).get("sha256") == recorded.sha256
    yield Check("config.json and the report name the same base", same, "" if same else "their hashes differ")
    name = "the base's tensors have the recorded SHA-256"
    try:
        settings = base_of(folder, base)
        found = model_sha256(load_base(settings, dtype="auto"))
    except InputError as error:
        if base is not None:
            raise
        yield Check(name, None, str(error))
    else:
        yield Check(name, found == recorded.sha256, "" if found == recorded.sha256 else f"{settings.model} has {found}")


def _texts(folder: Path, report: Report) -> Iterator[Check]:
    names = (
        "the training text has the recorded fingerprint",
        "the held-out text has the recorded fingerprint",
        "no held-out document is in the training text",
    )
    try:
        data = recorded_data(folder)
        with tempfile.TemporaryDirectory() as scratch:
            train, held_out = prepare(data, load_tokenizer(str(folder)), Path(scratch))
            infos = (train.info, held_out.info)
            del train, held_out
    except (InputError, OSError) as error:
        yield from (Check(name, None, first_line(error)) for name in names)
        return
    for name, split, info in zip(names, ("train", "eval"), infos, strict=False):
        recorded = getattr(report.data, split, None)
        same = recorded is not None and recorded.fingerprint == info.fingerprint
        yield Check(name, same, "" if same else f"the fingerprint is now {info.fingerprint}")
    yield Check(names[2], infos[1].disjoint, "" if infos[1].disjoint else "some held-out documents are")


__all__ = ["changed_files", "file_hashes", "verify_provenance"]
