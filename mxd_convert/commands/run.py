"""`run`: convert a model as a recipe says, from the plan to the finished checkpoint. Every step can be resumed."""

import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from mxd_convert.base_model.gguf import from_gguf
from mxd_convert.base_model.load import Spread, base_tokenizer, card_of, copy_processor, load_base
from mxd_convert.base_model.remote_code import trusting
from mxd_convert.checkpoint.assemble import assemble, origin_of
from mxd_convert.checkpoint.provenance import file_hashes
from mxd_convert.checkpoint.read import DASHBOARD, LOCAL, ONNX, REPORT, load_checkpoint
from mxd_convert.checkpoint.workspace import Workspace
from mxd_convert.commands.dashboard import write_dashboard
from mxd_convert.commands.export_onnx import export_onnx
from mxd_convert.commands.push import check_account, push
from mxd_convert.data.blocks import Blocks, check_vocabulary, prepare
from mxd_convert.errors import InputError, Stopped, disk_guard, memory_guard
from mxd_convert.escaping import say
from mxd_convert.evaluation.fidelity import evaluate_models
from mxd_convert.files import read_mapping, temporary_sibling, write_json, write_text
from mxd_convert.plan.memory import (
    BASE_SHARE,
    available,
    base_room,
    budget,
    check_joint,
    check_memory,
    fits_for_evaluation,
    groups,
    shares,
)
from mxd_convert.plan.resolve import Plan, check_gradients, check_processes, check_space, make_plan, twin_of
from mxd_convert.recipe.load import load_recipe
from mxd_convert.recipe.schema import Recipe, figure_mask
from mxd_convert.recipe.section import is_local
from mxd_convert.recipe.texts import Sources
from mxd_convert.report.card import write_card
from mxd_convert.report.plots import write_plots
from mxd_convert.report.schema import Report
from mxd_convert.report.write import build_report
from mxd_convert.training.accelerator import new_accelerator
from mxd_convert.training.distributed import agreed, connection_guard, once_per_machine
from mxd_convert.training.loop import Job, Trained, train_layers
from mxd_convert.training.tracking import finish_tracker, start_tracker

TWIN = "twin"  # folder of the dense twin, in the workspace


@dataclass(frozen=True)
class Result:
    """A finished conversion.

    Attributes:
        output: the checkpoint's folder.
        report: the content of mxd_report.json.
        already_finished: whether the checkpoint was finished before this call.
        main_process: whether this process is the one that reports. Always true in a run of one process.
        url: the repository on the Hub, if the recipe sets `output.push_to`.
        onnx_failures: one line per figure of the ONNX export that is out of tolerance. If there are any, no export is written.
    """

    output: Path
    report: dict[str, Any]
    already_finished: bool
    main_process: bool
    url: str | None = None
    onnx_failures: tuple[str, ...] = ()


@dataclass
class Context:
    """The state that the steps of one run share.

    Under torchrun every process has a context. All processes train; the main process does all other steps.
    run_id: the same in all processes of the run. trains: whether training has begun.
    """

    plan: Plan
    accelerator: Accelerator
    workspace: Workspace
    quiet: bool
    run_id: str = ""
    trains: bool = False

    @property
    def recipe(self) -> Recipe:
        """The plan's recipe."""
        return self.plan.recipe

    @property
    def main(self) -> bool:
        """Whether this is the main process."""
        return bool(self.accelerator.is_main_process)

    @property
    def processes(self) -> int:
        """Number of processes in the run."""
        return int(self.accelerator.num_processes)

    def say(self, line: str) -> None:
        """Print a progress line, unless quiet."""
        if not self.quiet:
            say(line)

    def agreed(self) -> AbstractContextManager[None]:
        """Return a context in which an error in one process is raised in all of them."""
        return agreed(self.processes, self.accelerator.process_index)


@dataclass(frozen=True)
class Assembled:
    """A checkpoint in the workspace. origin: the base model's entry. twin: the folder of the dense twin, if there is one."""

    folder: Path
    origin: dict[str, Any]
    twin: Path | None


def convert(
    recipe: Recipe | str | Path | Mapping[str, Any],
    output: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    fresh: bool = False,
    quiet: bool = False,
) -> Result:
    """Run a recipe from beginning to end, or resume its unfinished run.

    Args:
        recipe: a file, the name of a shipped recipe, a mapping or a Recipe.
        output: the folder of the finished checkpoint. Overrides the recipe's `output.dir`.
        overrides: recipe keys and their values, for example {"train.lr": 1e-3}.
        fresh: start over, and replace a converted checkpoint or an unfinished run at the output.
        quiet: write nothing to stderr.

    Raises:
        InputError: if the recipe, its files or the machine don't allow the run. The message gives the fix.
        KeyboardInterrupt: if the run is interrupted. It can be resumed.
    """
    settings = dict(overrides or {})
    if output is not None:
        settings["output.dir"] = str(Path(output).expanduser().absolute())
    with once_per_machine():
        loaded = load_recipe(recipe, settings)
        from_gguf(loaded.base, silent=quiet)  # once, with its own progress, before anything needs the model
    with trusting(loaded.base.trust_remote_code):
        return _convert(loaded, fresh, quiet)


def _convert(recipe: Recipe, fresh: bool, quiet: bool) -> Result:
    with once_per_machine():
        plan = make_plan(recipe)
        accelerator = new_accelerator(plan.recipe.train, plan.output.parent / "logs")
    workspace = Workspace(plan.recipe, plan.output, fresh)
    run = Context(plan, accelerator, workspace, quiet or not accelerator.is_main_process)
    with connection_guard(run.processes), ExitStack() as stack:
        with run.agreed():
            report = workspace.finished()
        if report is None:
            with run.agreed():
                if run.main:
                    stack.enter_context(workspace.locked())
            stack.enter_context(disk_guard(plan.output))
            result = _convert_in_workspace(run)
        else:
            result = _already_finished(run, report)
        return _export(run, _publish(run, result))


def _already_finished(run: Context, report: dict[str, Any]) -> Result:
    output = run.plan.output
    if run.main:
        run.workspace.tidy()
        if run.recipe.output.dashboard and not (output / DASHBOARD).is_dir():
            command = f"mxd-convert dashboard {output} --data TEXT --output {output / DASHBOARD}"
            run.say(f"the checkpoint has no dashboard. `{command}` writes one.")
    return Result(output, report, True, run.main)


def _convert_in_workspace(run: Context) -> Result:
    """Do all steps in the workspace. A run that fails before it has trained anything leaves no workspace behind."""
    try:
        _check_processes_agree(run)
        with _reported_once(run):
            tokenizer = _check(run)
            train, held_out = _prepare(run, tokenizer)
            trained = _train(run, train)
            with run.agreed(), _enough_memory(run):
                if trained is not None:  # in the main process
                    assembled = _assemble(run, trained, tokenizer)
                    figures = _evaluate(run, assembled, held_out)
                    _write_dashboard(run, assembled.folder, held_out, tokenizer)
                    about = {**assembled.origin, **card_of(run.recipe.base)}
                    _write_report(run, assembled.folder, build_report(run.plan, about, train, held_out, trained, figures))
                    run.workspace.publish(assembled.folder)
            return Result(run.plan.output, read_mapping(run.plan.output / REPORT), False, run.main)
    except Exception:
        if run.main and (not run.trains or run.processes == 1):  # otherwise other processes may be writing there
            run.workspace.remove_if_untrained()
        raise


def _enough_memory(run: Context) -> AbstractContextManager[None]:
    """Return a context in which running out of memory is an InputError that gives the fix."""
    layer = run.recipe.layer
    return memory_guard(
        "out of memory while assembling and evaluating. Free some memory, convert fewer layers (layers: ...) or lower"
        f" {layer.size_key} ({layer.size}). The trained layers are kept. The same command resumes from there."
    )


# --- steps ----------------------------------------------------------------------------------------------------------------------


def _check(run: Context) -> Any:
    """Check everything that can be checked before any work is done. Return the base's tokenizer."""
    with run.agreed():
        if run.main:
            if run.recipe.output.push_to is not None:
                check_account(run.recipe.output.push_to)
            run.workspace.claim(run.say)
            resumed = run.workspace.has_state()
            if not resumed:
                check_space(run.plan)
            check_processes(run.plan, run.processes)
            check_memory(run.plan, run.processes, begun=resumed)
            for warning in run.plan.warnings:
                run.say(f"warning: {warning}")
        return base_tokenizer(run.recipe.base)


def _prepare(run: Context, tokenizer: Any) -> tuple[Blocks, Blocks]:
    """Return the tokenised training and held-out text. The main process writes both; the others read them."""
    found: list[tuple[Blocks, Blocks]] = []
    for mains_turn in (True, False):
        with run.agreed():
            if run.main == mains_turn:
                found.append(prepare(run.recipe.data, tokenizer, run.workspace.folder / "data", run.say))
                check_vocabulary(found[0][0].ids, run.plan.vocabulary)
    [(train, held_out)] = found
    run.say(_summary(run, train, held_out))
    return train, held_out


def _summary(run: Context, train: Blocks, held_out: Blocks) -> str:
    plan, settings = run.plan, run.recipe.train
    many = f" over {run.processes} processes;" if run.processes > 1 else ""
    joint = f", the last {plan.joint_steps:,} in the joint stage" if plan.joint_steps else ""
    return (
        f"{len(plan.layers)} layer{'s' if len(plan.layers) > 1 else ''}, {plan.layers[0].shape};"
        f" {plan.steps:,} steps of {plan.tokens // plan.steps:,} tokens (lr {settings.lr:g}, {settings.schedule}{joint});"
        f"{many} {len(train) * train.context:,} tokens of text, {len(held_out) * held_out.context:,} held out"
    )


def _train(run: Context, blocks: Blocks) -> Trained | None:
    """Train the layers, and the dense twin if the recipe asks for it. Return None in all processes but the main one."""
    [room] = broadcast_object_list([budget(run.recipe)])  # all processes must form the same groups of layers
    with run.agreed():
        check_joint(run.plan, room)
        start_tracker(run.accelerator, run.recipe, run.plan.output.name)
        base = load_base(run.recipe.base, spread=_spread(run, room))
        check_gradients(
            run.recipe, base.dtype == torch.float16
        )  # with `dtype: auto` the weights decide the dtype, not the config
    run.trains = True
    trained = train_layers(_job(run, run.plan, base, blocks, run.workspace.folder, room))
    finish_tracker(run.accelerator)
    if run.recipe.train.twin:
        run.say("training the dense twin:")
        twin = train_layers(_job(run, twin_of(run.plan), base, blocks, run.workspace.folder / TWIN, room))
        if trained is not None:
            trained.twin = twin
    return trained


def _spread(run: Context, room: int) -> Spread | None:
    """Return how to spread a base model too large for the device over device, memory and disk; None if it fits."""
    most = base_room(run.plan, room)
    if most is None:
        return None
    run.say(
        "the base model takes more than half of the available memory. accelerate spreads it over device, memory and disk, which is slower."
    )
    device, offload = run.accelerator.device, run.workspace.folder / "offload"
    if device.type == "cpu":
        return Spread({"cpu": most}, offload)
    return Spread({device.index or 0: most, "cpu": int(BASE_SHARE * available("cpu"))}, offload)


def _job(run: Context, plan: Plan, base: Any, blocks: Blocks, folder: Path, room: int) -> Job:
    return Job(
        plan.recipe,
        base,
        plan.sites,
        plan.shapes,
        blocks,
        folder,
        run.accelerator,
        shares(plan, run.processes),
        lambda indices: groups(plan, indices, room, run.processes),
        run.quiet,
    )


def _assemble(run: Context, trained: Trained, tokenizer: Any) -> Assembled:
    """Write the checkpoint, and that of the dense twin, into the workspace."""
    original = load_base(run.recipe.base, dtype="auto")
    origin = origin_of(run.recipe.base, original)
    folder = assemble(original, trained.layers, origin, run.workspace.folder / "checkpoint", tokenizer)
    if original.config.get_text_config() is not original.config:  # a model with images too
        copy_processor(run.recipe.base.model, folder, run.recipe.base.revision)
    twin = None
    if trained.twin is not None:
        twin = assemble(original, trained.twin.layers, origin, run.workspace.folder / TWIN / "checkpoint")
    return Assembled(folder, origin, twin)


def _evaluate(run: Context, assembled: Assembled, held_out: Blocks) -> dict[str, Any]:
    """Return the evaluation of the checkpoint, loaded from disk."""
    converted = load_checkpoint(assembled.folder, dtype="float32")
    constant = None if assembled.twin is None else load_checkpoint(assembled.twin, dtype="float32")
    base = load_base(run.recipe.base, dtype="float32")
    mask, device = figure_mask(run.recipe.train.mask), _evaluation_device(run)
    return evaluate_models(base, converted, run.plan.sites, held_out, mask, device, run.quiet, constant)


def _write_dashboard(run: Context, folder: Path, held_out: Blocks, tokenizer: Any) -> None:
    """Write the dashboard into the checkpoint's folder, if the recipe asks for it."""
    if not run.recipe.output.dashboard:
        return
    write_dashboard(
        folder / DASHBOARD,
        load_checkpoint(folder, dtype="float32"),
        tokenizer,
        held_out,
        run.plan.output.name,
        mask=run.recipe.train.mask,
        device=_evaluation_device(run),
        quiet=run.quiet,
    )


def _evaluation_device(run: Context) -> torch.device:
    device: torch.device = run.accelerator.device
    return device if fits_for_evaluation(run.plan, device.type) else torch.device("cpu")


def _write_report(run: Context, folder: Path, report: Report) -> None:
    """Write the recipe, log, plots, card and report into the checkpoint's folder."""
    recipe, on_hub = run.recipe, not run.recipe.base.is_local
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    shutil.copyfile(run.workspace.folder / "training_log.jsonl", folder / "training_log.jsonl")
    texts = {"train": recipe.data.train, "eval": recipe.data.eval}
    local = {
        **({} if on_hub else {"base": recipe.base.path}),
        "data": {split: [source.path for _, source in text.entries()] for split, text in texts.items() if _is_here(text)},
        "recipe": recipe.fingerprint(),
    }
    write_json(folder / LOCAL, local)
    write_plots(folder, report, folder / "training_log.jsonl")
    report.files = file_hashes(folder)
    write_card(folder, report, recipe.to_yaml(), base_on_hub=on_hub)
    write_json(folder / REPORT, report.to_dict())


def _is_here(text: Sources) -> bool:
    """Return whether a text is given, and all of it is on this machine."""
    return text.is_given and all(is_local(source.path) for _, source in text.entries())


def _publish(run: Context, result: Result) -> Result:
    """Push the finished checkpoint to the Hub if the recipe asks for it."""
    name = run.recipe.output.push_to
    if name is None or not run.main:
        return result
    run.say(f"publishing to {name}")
    try:
        return replace(result, url=push(result.output, name, base=run.recipe.base.model).url)
    except InputError as error:
        raise InputError(
            f"{error}\nThe checkpoint is finished: `mxd-convert push {result.output} {name}` publishes it."
        ) from error


def _export(run: Context, result: Result) -> Result:
    """Export the finished checkpoint to ONNX if the recipe asks for it."""
    target = result.output / ONNX
    if not run.recipe.output.onnx or not run.main or target.exists():
        return result
    try:
        with temporary_sibling(result.output) as scratch:
            export = export_onnx(result.output, scratch / ONNX, quiet=run.quiet)
            if export.output is not None:
                export.output.rename(target)
    except InputError as error:
        raise InputError(
            f"{error}\nThe checkpoint is finished: `mxd-convert export-onnx {result.output} DIR` exports it."
        ) from error
    return replace(result, onnx_failures=tuple(export.failures))


# --- several processes ----------------------------------------------------------------------------------------------------------


def _check_processes_agree(run: Context) -> None:
    """Raise InputError if the processes have different recipes or see different workspaces."""
    if run.processes == 1:
        return
    [run.run_id, recipe] = broadcast_object_list([uuid.uuid4().hex, run.recipe.model_dump()])
    if run.main:
        run.workspace.write_run_id(run.run_id)
    run.accelerator.wait_for_everyone()
    with run.agreed():
        run.workspace.check_run_id(run.run_id)
        if recipe != run.recipe.model_dump():
            raise InputError(
                "recipe: differs between processes after its paths and the base's revision are resolved. Give all processes the same"
                " files under the same paths, and set base.revision to a commit."
            )


@contextmanager
def _reported_once(run: Context) -> Iterator[None]:
    """Let only the first process that finds an error report it."""

    def is_first() -> bool:
        return run.processes == 1 or run.workspace.first_to_report(run.run_id)

    try:
        with connection_guard(run.processes):
            yield
    except InputError as error:
        error.reported_elsewhere = error.reported_elsewhere or not is_first()
        raise
    except KeyboardInterrupt:
        stopped = Stopped()
        stopped.reported_elsewhere = not is_first()
        raise stopped from None
