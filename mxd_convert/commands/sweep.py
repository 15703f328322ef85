"""`sweep`: run a recipe over a grid of recipe keys. Runs that read the same activations are trained in one pass.

The sweep's folder has one checkpoint per run in `runs/<name>/`, one row per run in `sweep.csv` and `sweep.json`, and the plots in
`plots/`. The same command resumes a sweep: finished runs are kept, unfinished runs resume.
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

from mxd_convert.base_model.load import base_tokenizer, load_base
from mxd_convert.checkpoint.read import REPORT, read_report
from mxd_convert.checkpoint.workspace import Workspace
from mxd_convert.commands.run import convert
from mxd_convert.data.blocks import check_vocabulary, prepare
from mxd_convert.errors import InputError, NotFinite, disk_guard
from mxd_convert.files import check_free_space, read_mapping, read_sealed, write_sealed
from mxd_convert.plan.memory import budget, check_memory, fitting_together
from mxd_convert.plan.resolve import Plan, check_gradients, make_plan
from mxd_convert.recipe.load import load_recipe, parse_list, parse_overrides
from mxd_convert.recipe.schema import Recipe
from mxd_convert.report.difference import behind_best
from mxd_convert.report.frontier import row_of, write_frontier, write_table
from mxd_convert.training.accelerator import new_accelerator
from mxd_convert.training.loop import Job
from mxd_convert.training.together import same_activations, train_together

MARK = "sweep.mark"  # file with the fingerprints of the runs' recipes and the rows of finished runs
# keys without a meaning for kinds that have no experts
_OF_EXPERTS = ("layer.k", "layer.experts", "layer.expansion", "layer.sparsity", "layer.l1")


@dataclass(frozen=True)
class Sweep:
    """A finished sweep.

    output: the sweep's folder. rows: one per run, as in sweep.json, with the swept settings and the figures.
    """

    output: Path
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class _Run:
    """A run of the sweep."""

    name: str
    settings: dict[str, Any]  # values of the swept keys
    plan: Plan


def parse_grid(settings: Sequence[str]) -> dict[str, list[Any]]:
    """Return the grid of `--set` options; values are read as YAML. Raises InputError for a setting without a key or a value.

    Example: `["layer.k=8,16", "train.lr=1e-3"]` gives `{"layer.k": [8, 16], "train.lr": [0.001]}`.
    """
    return {key: values for setting in settings for key, values in [parse_list(setting)]}


def parse_arm(settings: str) -> dict[str, Any]:
    """Return the settings of an `--arm` option. Raises InputError for a setting without a key or a value.

    Example: `"layer.kind=transcoder train.lr=1e-2"` gives `{"layer.kind": "transcoder", "train.lr": 0.01}`.
    """
    return parse_overrides(settings.split(), "--arm")


def sweep(
    recipe: Recipe | str | Path | Mapping[str, Any],
    grid: Mapping[str, Sequence[Any]],
    output: str | Path,
    fresh: bool = False,
    quiet: bool = False,
    arms: Sequence[Mapping[str, Any]] = (),
) -> Sweep:
    """Run a recipe for every combination of the grid's values, or resume an unfinished sweep.

    The dense twin is a value of `layer.kind`. It has no experts, so it runs once for all settings of the experts.
    The other runs train no twin of their own unless the grid sets `train.twin`.

    Args:
        recipe: a file, the name of a shipped recipe, a mapping or a Recipe.
        grid: the values of each key, for example {"layer.k": [8, 16], "layer.kind": ["mxd", "transcoder"]}. A key with one value
            applies to all runs.
        output: the sweep's folder.
        fresh: start over, and replace an earlier sweep in the folder.
        quiet: write nothing to stderr.
        arms: settings that belong together, such as a kind of layer and its learning rate. Each is combined with all of the grid.

    Returns:
        The finished sweep. A run whose loss is not finite has the error in its row; the other runs continue.

    Raises:
        InputError: if a recipe or the folder can't be used. Raised before any training.
    """
    folder = Path(output).expanduser().absolute()
    runs = _runs(recipe, grid, arms, folder)
    mark = _claim(folder, runs, fresh)
    say = _Say(quiet)
    with disk_guard(folder):
        failed = _train(folder, runs, say)
        rows: list[dict[str, Any]] = []
        for run in runs:
            rows.append(_complete(run, failed, mark["rows"], say))
            write_sealed(folder / MARK, mark)
            _write(folder, runs, rows)  # after every run, so that an interrupted sweep leaves a table of the finished runs
        if any("ce_base" in row for row in rows):
            _compare_to_best(runs, rows)
            _write(folder, runs, rows)
            write_frontier(folder / "plots", rows)
        shutil.rmtree(folder / "data", ignore_errors=True)
    return Sweep(folder, rows)


class _Say:
    """Print a progress line to stderr, unless quiet."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def __call__(self, line: str) -> None:
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)


# --- runs of the grid -----------------------------------------------------------------------------------------------------------


def _runs(recipe: Any, grid: Mapping[str, Sequence[Any]], arms: Sequence[Mapping[str, Any]], folder: Path) -> list[_Run]:
    """Return one run per distinct combination of arm and grid values, with its plan checked against the memory."""
    if not grid and not arms:
        raise InputError(
            "--set: the sweep has no grid. Give at least one key with several values, for example --set layer.k=8,16,32."
        )
    twice = sorted({key for arm in arms for key in arm} & set(grid))
    if twice:
        raise InputError(f"--set {twice[0]}: an --arm sets this key too. Remove one of them.")
    swept = {key for arm in arms for key in arm if len(arms) > 1} | {key for key, values in grid.items() if len(values) > 1}
    found: dict[str, _Run] = {}
    for arm, values in itertools.product(arms or [{}], itertools.product(*grid.values())):
        # every run would train the same twin; a sweep has the twin as a kind instead
        settings = {"train.twin": False, **arm, **dict(zip(grid, values, strict=True))}
        layer = load_recipe(recipe, settings).layer
        if not layer.traits.has_experts:
            settings = {key: value for key, value in settings.items() if key not in _OF_EXPERTS}
            settings |= {"train.joint": 0.0} if layer.sparsity == "l1" else {}  # the other runs can't have a joint stage
        shown = {key: value for key, value in settings.items() if key in swept}
        name = _name(shown)
        if name in found:
            if found[name].settings != shown:
                raise InputError(
                    f"--set: two combinations would have the same name, {name}. Use values that differ in letters or digits."
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
    """Return the name of a run's folder, such as `kind-mxd_k-8`."""
    pairs = [f"{key.rpartition('.')[2]}-{value}" for key, value in settings.items()]
    return re.sub(r"[^\w.,=-]+", "-", "_".join(pairs)).strip("-.") or "run"


def _claim(folder: Path, runs: list[_Run], fresh: bool) -> dict[str, Any]:
    """Write the sweep's mark into the folder and return it.

    Raises InputError if the folder contains other files or another recipe's sweep, or if the disk is too small.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder}: is a file. Choose another folder.")
    ours = {run.name: run.plan.recipe.fingerprint() for run in runs}
    rows: dict[str, Any] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        holds_something = any(folder.iterdir())
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise InputError(f"--output {folder}: can't be written ({error.strerror}). Choose another folder.") from None
    if holds_something:
        if not (folder / MARK).is_file():
            raise InputError(f"--output {folder}: is not empty and not a sweep. Choose another folder.")
        if not fresh:
            theirs, rows = _read_mark(folder / MARK)
            if any(ours.get(name, print_) != print_ for name, print_ in theirs.items()):
                raise InputError(
                    f"--output {folder}: contains a sweep of another recipe. Use --fresh to start over, or choose another folder."
                )
            ours = {**theirs, **ours}
    if fresh:
        for name in ("runs", "plots", "data"):
            shutil.rmtree(folder / name, ignore_errors=True)
    left = [run for run in runs if not (run.plan.output / REPORT).is_file()]
    need = sum(run.plan.disk_bytes for run in left)
    check_free_space(folder, need, f"--output {folder}: the sweep of {len(left)} runs", " or choose another folder")
    mark = {"recipes": ours, "rows": rows}
    write_sealed(folder / MARK, mark)
    return mark


def _read_mark(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the fingerprints and the rows, each by the name of the run. Raises InputError if the mark is damaged."""
    mark = read_sealed(path)
    if mark is not None:
        return mark["recipes"], mark["rows"]
    fix = "Use --fresh to start over, or choose another folder."
    before = read_mapping(path, fix)  # earlier versions wrote only the fingerprints
    if all(isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) for value in before.values()):
        return before, {}
    raise InputError(f"{path}: damaged. {fix}")


# --- training, evaluation, table ------------------------------------------------------------------------------------------------


def _train(folder: Path, runs: list[_Run], say: _Say) -> dict[str, InputError]:
    """Train the unfinished runs, as many as possible on one harvest of activations. Return the errors by run."""
    left = [run for run in runs if not (run.plan.output / REPORT).is_file()]
    done = len(runs) - len(left)
    say(f"{len(runs)} runs" + (f", {done} already finished" if done else ""))
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
    """Return the folder of a group's tokens, named by a hash of everything that they depend on."""
    content = json.dumps([recipe.data.model_dump(), recipe.base.model_dump(), dict(inputs)], sort_keys=True)
    return root / hashlib.sha256(content.encode()).hexdigest()[:16]


def _shares_a_pass(recipe: Recipe) -> bool:
    """Return whether a run can be trained together with others.

    In sequential order the inputs depend on the run's own layers. Several processes and trackers belong to a single run.
    """
    train = recipe.train
    return train.order == "parallel" and train.tracker == "none" and os.environ.get("WORLD_SIZE", "1") == "1"


def _train_group(data: Path, group: list[_Run], say: _Say) -> dict[str, InputError]:
    """Train runs that read the same activations in one pass. Return the errors by run."""
    recipe = group[0].plan.recipe
    data = _data_folder(data, recipe, Workspace(recipe, group[0].plan.output, fresh=False).inputs(say))
    tokenizer = base_tokenizer(recipe.base)
    train, _ = prepare(recipe.data, tokenizer, data, say)
    check_vocabulary(train.ids, group[0].plan.vocabulary)
    say(f"training {len(group)} runs on the same activations: {', '.join(run.name for run in group)}")
    base = load_base(recipe.base)
    for run in group:
        check_gradients(run.plan.recipe, base.dtype == torch.float16)
    with ExitStack() as stack:
        jobs, first = [], group[0].plan
        accelerator = new_accelerator(first.recipe.train, first.output.parent / "logs")
        for run in group:
            workspace = Workspace(run.plan.recipe, run.plan.output, fresh=False)
            workspace.finished()
            stack.enter_context(workspace.locked())
            workspace.claim()
            _lend(data, workspace.folder / "data")
            indices = [layer.index for layer in run.plan.layers]
            jobs.append(
                Job(
                    run.plan.recipe,
                    base,
                    run.plan.sites,
                    run.plan.shapes,
                    train,
                    workspace.folder,
                    accelerator,
                    [indices],
                    lambda layers: [layers],
                    quiet=True,
                )
            )
        return {group[number].name: error for number, error in train_together(jobs, say.quiet).items()}


def _lend(data: Path, folder: Path) -> None:
    """Link the shared token files into a run's folder, or copy them if the file system has no links."""
    if (folder / "data.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(data.iterdir(), key=lambda file: file.suffix == ".json"):  # manifest last: it marks the data as complete
        target = folder / file.name
        target.unlink(missing_ok=True)
        with suppress(OSError):
            os.link(file, target)
        if not target.is_file():
            shutil.copyfile(file, target)


def _complete(run: _Run, failed: Mapping[str, InputError], rows: dict[str, Any], say: _Say) -> dict[str, Any]:
    """Do the remaining steps of a run, and return its row.

    rows: the rows of finished runs by name; this run's row is added. An existing row is kept, even if the report has changed.
    """
    head = {"name": run.name, **run.settings}
    error: InputError | None = failed.get(run.name)
    if error is None:
        trained = Workspace(run.plan.recipe, run.plan.output, fresh=False).has_state()
        left = "joint stage and evaluation" if run.plan.joint_steps else "evaluation"
        say(f"{run.name}: " + (left if trained else "training and evaluation"))
        try:
            result = convert(run.plan.recipe, quiet=say.quiet or (trained and not run.plan.joint_steps))
            if not result.already_finished or run.name not in rows:
                rows[run.name] = _row(result.output, run.plan)
            return head | rows[run.name]
        except NotFinite as caught:
            error = caught
    say(f"{run.name}: failed: {error}")
    return head | {"error": str(error)}


def _row(folder: Path, plan: Plan) -> dict[str, Any]:
    report = read_report(folder)
    if report is None or None in (report.fidelity, report.reliance, report.data, report.cost):
        raise InputError(
            f"{folder / REPORT}: not a readable report. Remove {folder} and run the same command again to repeat the run."
        )
    return row_of(report, plan.recipe, plan.layers)


def _compare_to_best(runs: list[_Run], rows: list[dict[str, Any]]) -> None:
    """Add to each finished row how far its rise in cross-entropy is behind the lowest, with the standard error."""
    finished = {run.name: row for run, row in zip(runs, rows, strict=True) if "error" not in row}
    reports = {run.name: read_report(run.plan.output) for run in runs if run.name in finished}
    found = behind_best(finished, {name: report for name, report in reports.items() if report is not None})
    for run, row in zip(runs, rows, strict=True):
        row.update(found.get(run.name, {}))


def _write(folder: Path, runs: list[_Run], rows: list[dict[str, Any]]) -> None:
    """Write the table: the rows, and the recipe without the swept keys."""
    recipe = runs[0].plan.recipe.published()
    recipe.pop("output")
    for key in {key for run in runs for key in run.settings} | {"layer.kind", "layer.k"}:
        *sections, last = key.split(".")
        content: Any = recipe
        for section in sections:
            content = content.get(section) or {}
        content.pop(last, None)
    write_table(folder, {"recipe": recipe, "runs": rows})
