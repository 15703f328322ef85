"""`sweep`: a grid over recipe keys. Runs that read the same activations are trained in one pass; each ends as a checkpoint of its own.

The sweep's folder holds `runs/<name>/`, a finished checkpoint each; `sweep.csv` and `sweep.json`, a row a run; `plots/`. What is finished is
not done again, and what was cut off goes on.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mxd_convert.base_model.load import load_base, load_tokenizer
from mxd_convert.checkpoint.read import REPORT, read_report
from mxd_convert.checkpoint.workspace import Workspace
from mxd_convert.commands.run import convert
from mxd_convert.data.blocks import check_vocabulary, prepare
from mxd_convert.errors import InputError, NotFinite, disk_guard
from mxd_convert.files import read_mapping, read_sealed, write_sealed
from mxd_convert.plan.memory import budget, check_memory, fitting_together
from mxd_convert.plan.resolve import Plan, check_gradients, make_plan
from mxd_convert.recipe.load import load_recipe, parse_list
from mxd_convert.recipe.schema import Recipe
from mxd_convert.report.frontier import row_of, write_frontier, write_table
from mxd_convert.training.accelerator import new_accelerator
from mxd_convert.training.loop import Job
from mxd_convert.training.together import same_activations, train_together

TABLE = "sweep.json"
MARK = "sweep.mark"  # the recipes of the sweep's runs, and the rows of those that are finished
# keys that mean nothing where there are no experts
_OF_EXPERTS = ("layer.k", "layer.experts", "layer.expansion", "layer.sparsity", "layer.l1")


@dataclass(frozen=True)
class Sweep:
    """A finished sweep. rows: as in sweep.json, one a run, with the settings that differ and the figures."""

    output: Path
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class _Run:
    name: str
    settings: dict[str, Any]  # of the grid's keys
    plan: Plan


def parse_grid(settings: Sequence[str]) -> dict[str, list[Any]]:
    """`["layer.k=8,16", "train.lr=1e-3"]` -> {"layer.k": [8, 16], "train.lr": [0.001]}, values read as YAML. Raises InputError."""
    return {key: values for setting in settings for key, values in [parse_list(setting)]}


def sweep(
    recipe: Recipe | str | Path | Mapping[str, Any],
    grid: Mapping[str, Sequence[Any]],
    output: str | Path,
    fresh: bool = False,
    quiet: bool = False,
) -> Sweep:
    """Runs a recipe for every combination of the grid's values, or goes on with a sweep that was cut off.

    grid: {"layer.k": [8, 16], "layer.kind": ["mxd", "transcoder"]}; a key with one value holds for all runs. The dense twin, which has
    no experts, is a kind among them, run once for all of the experts' settings, and not trained beside the runs (`train.twin`) unless the
    grid says so. fresh: start over. Raises InputError before anything is trained for whatever the user can put right; a run whose loss is
    not finite is noted in the table, and the others go on.
    """
    folder = Path(output).expanduser().absolute()
    runs = _runs(recipe, grid, folder)
    mark = _claim(folder, runs, fresh)
    say = _Say(quiet)
    with disk_guard(folder):
        failed = _train(folder, runs, say)
        rows: list[dict[str, Any]] = []
        for run in runs:
            rows.append(_finish(run, failed, mark["rows"], say))
            write_sealed(folder / MARK, mark)
            _write(folder, runs, rows)  # what is there is worth having, should the rest be cut off
        if any("ce_base" in row for row in rows):
            write_frontier(folder / "plots", rows)
        shutil.rmtree(folder / "data", ignore_errors=True)
    return Sweep(folder, rows)


class _Say:
    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def __call__(self, line: str) -> None:
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)


# --- what is to be run -----------------------------------------------------------------------------------------------------------


def _runs(recipe: Any, grid: Mapping[str, Sequence[Any]], folder: Path) -> list[_Run]:
    if not grid:
        raise InputError("--set: give at least one key of several values, for example --set layer.k=8,16,32")
    swept = [key for key, values in grid.items() if len(values) > 1]
    found: dict[str, _Run] = {}
    for values in itertools.product(*grid.values()):
        # a twin beside every run would be the same one each time: here it is a kind
        settings = {"train.twin": False, **dict(zip(grid, values, strict=True))}
        layer = load_recipe(recipe, settings).layer
        if not layer.facts.has_experts:
            settings = {key: value for key, value in settings.items() if key not in _OF_EXPERTS}
            settings |= {"train.joint": 0.0} if layer.sparsity == "l1" else {}  # which those beside it can't have
        shown = {key: value for key, value in settings.items() if key in swept}
        name = _name(shown)
        if name in found:
            if found[name].settings != shown:
                raise InputError(
                    f"--set: two combinations would both be called {name}; give values that differ in letters and figures"
                )
            continue
        made = make_plan(
            load_recipe(
                recipe, {**settings, "output.dir": str(folder / "runs" / name), "output.push_to": None, "output.onnx": False}
            )
        )
        check_memory(made)
        found[name] = _Run(name, shown, made)
    return list(found.values())


def _name(settings: Mapping[str, Any]) -> str:
    """A folder's name: `kind-mxd_k-8`."""
    words = [f"{key.rpartition('.')[2]}-{value}" for key, value in settings.items()]
    return re.sub(r"[^\w.,=-]+", "-", "_".join(words)).strip("-.") or "run"


def _claim(folder: Path, runs: list[_Run], fresh: bool) -> dict[str, Any]:
    """Make the folder this sweep's; return its mark. Raises InputError where something else is there, or the disk can't hold it."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder}: is a file; choose another folder")
    ours = {run.name: run.plan.recipe.fingerprint() for run in runs}
    rows: dict[str, Any] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        holds_something = any(folder.iterdir())
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise InputError(f"--output {folder}: can't be written ({error.strerror}); choose another folder") from None
    if holds_something:
        if not (folder / MARK).is_file():
            raise InputError(f"--output {folder}: holds something else than a sweep; choose another folder")
        if not fresh:
            theirs, rows = _read_mark(folder / MARK)
            if any(ours.get(name, print_) != print_ for name, print_ in theirs.items()):
                raise InputError(
                    f"--output {folder}: holds a sweep of another recipe; --fresh to start over, or choose another folder"
                )
            ours = {**theirs, **ours}
    if fresh:
        for part in ("runs", "plots", "data"):
            shutil.rmtree(folder / part, ignore_errors=True)
    left = [run for run in runs if not (run.plan.output / REPORT).is_file()]
    need, free = sum(run.plan.disk_bytes for run in left), shutil.disk_usage(folder).free
    if need > free:
        raise InputError(
            f"--output {folder}: the {len(left)} runs need about {need / 2**20:,.0f} MiB of disk and {free / 2**20:,.0f} are free;"
            " free some or choose another folder"
        )
    mark = {"recipes": ours, "rows": rows}
    write_sealed(folder / MARK, mark)
    return mark


def _read_mark(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Return fingerprints and rows by the names of runs. Raises InputError where the mark is damaged."""
    mark = read_sealed(path)
    if mark is not None:
        return mark["recipes"], mark["rows"]
    fix = "give --fresh to start over, or choose another folder"
    before = read_mapping(path, fix)  # earlier versions wrote the fingerprints alone
    if all(isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) for value in before.values()):
        return before, {}
    raise InputError(f"{path}: damaged; {fix}")


# --- training, evaluation, table -------------------------------------------------------------------------------------------------


def _train(folder: Path, runs: list[_Run], say: _Say) -> dict[str, InputError]:
    """Trains what is not finished, as much as possible from one harvest. Returns what went wrong, by run."""
    left = [run for run in runs if not (run.plan.output / REPORT).is_file()]
    done = len(runs) - len(left)
    say(f"{len(runs)} runs" + (f", {done} of them done already" if done else ""))
    alike: dict[str, list[_Run]] = {}
    for run in left:
        if _shares_a_pass(run.plan.recipe):
            alike.setdefault(same_activations(run.plan.recipe), []).append(run)
    failed: dict[str, InputError] = {}
    for group in alike.values():
        for members in fitting_together([run.plan for run in group], budget(group[0].plan.recipe)):
            if len(members) > 1:
                failed |= _train_group(folder / "data", [group[index] for index in members], say)
    return failed


def _data_folder(root: Path, recipe: Recipe, inputs: Mapping[str, str]) -> Path:
    """Return a group's folder for tokens: named after all that they are made of, so that no other text's are ever taken for them."""
    content = json.dumps([recipe.data.model_dump(), recipe.base.model_dump(), dict(inputs)], sort_keys=True)
    return root / hashlib.sha256(content.encode()).hexdigest()[:16]


def _shares_a_pass(recipe: Recipe) -> bool:
    """Not in sequential order, where inputs come from the run's own layers, nor where it has processes or a tracker to itself."""
    train = recipe.train
    return train.order == "parallel" and train.tracker == "none" and os.environ.get("WORLD_SIZE", "1") == "1"


def _train_group(data: Path, group: list[_Run], say: _Say) -> dict[str, InputError]:
    recipe = group[0].plan.recipe
    data = _data_folder(data, recipe, Workspace(recipe, group[0].plan.output, fresh=False).inputs(say))
    tokenizer = load_tokenizer(recipe.base.model, recipe.base.revision, recipe.base.trust_remote_code)
    train, _ = prepare(recipe.data, tokenizer, data, say)
    check_vocabulary(train, group[0].plan.vocabulary)
    say(f"training {len(group)} runs from one harvest of activations: {', '.join(run.name for run in group)}")
    base = load_base(recipe.base)
    for run in group:
        check_gradients(run.plan.recipe, base.dtype == torch.float16)
    with ExitStack() as stack:
        jobs, first = [], group[0].plan
        accelerator = new_accelerator(first.recipe.train, first.output.parent / "logs")
        for run in group:
            place = Workspace(run.plan.recipe, run.plan.output, fresh=False)
            place.finished()
            stack.enter_context(place.locked())
            place.claim()
            _lend(data, place.work / "data")
            indices = [layer.index for layer in run.plan.layers]
            jobs.append(
                Job(
                    run.plan.recipe,
                    base,
                    run.plan.sites,
                    run.plan.shapes,
                    train,
                    place.work,
                    accelerator,
                    [indices],
                    lambda layers: [layers],
                    quiet=True,
                )
            )
        return {group[number].name: error for number, error in train_together(jobs, say.quiet).items()}


def _lend(data: Path, folder: Path) -> None:
    """The tokens once for all runs: a link to each file, or a copy where the file system has no links."""
    if (folder / "data.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(data.iterdir(), key=lambda file: file.suffix == ".json"):  # the manifest last: with it they are whole
        target = folder / file.name
        target.unlink(missing_ok=True)
        with suppress(OSError):
            os.link(file, target)
        if not target.is_file():
            shutil.copyfile(file, target)


def _finish(run: _Run, failed: Mapping[str, InputError], rows: dict[str, Any], say: _Say) -> dict[str, Any]:
    """Do what is left of a run: all of it, or only its joint stage, assembly and evaluation. Returns its row.

    rows: of finished runs, by name, to which this one's is added. One that is there already holds what the sweep has measured, whatever has
    become of the run's report.
    """
    start = {"name": run.name, **run.settings}
    error: InputError | None = failed.get(run.name)
    if error is None:
        trained = Workspace(run.plan.recipe, run.plan.output, fresh=False).has_state()
        left = "finishing and evaluating" if run.plan.joint_steps else "evaluating"
        say(f"{run.name}: " + (left if trained else "training and evaluating"))
        try:
            result = convert(run.plan.recipe, quiet=say.quiet or (trained and not run.plan.joint_steps))
            if not result.already_finished or run.name not in rows:
                rows[run.name] = _row(result.output, run.plan)
            return start | rows[run.name]
        except NotFinite as caught:
            error = caught
    say(f"{run.name}: failed: {error}")
    return start | {"error": str(error)}


def _row(folder: Path, plan: Plan) -> dict[str, Any]:
    report = read_report(folder)
    if report is None or None in (report.fidelity, report.reliance, report.data, report.cost):
        raise InputError(f"{folder / REPORT}: not a readable report; remove {folder}, and its run is done again")
    return row_of(report, plan.recipe, plan.layers)


def _write(folder: Path, runs: list[_Run], rows: list[dict[str, Any]]) -> None:
    """The table; beside the rows the recipe that they share, without what differs among them."""
    recipe = runs[0].plan.recipe.published()
    recipe.pop("output")
    for key in {key for run in runs for key in run.settings} | {"layer.kind", "layer.k"}:
        *sections, last = key.split(".")
        content: Any = recipe
        for section in sections:
            content = content.get(section) or {}
        content.pop(last, None)
    write_table(folder, {"recipe": recipe, "runs": rows})
