"""plan -> train -> assemble -> evaluate -> report, each stage resumable."""

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list

from mxd_convert.base_model.load import Spread, card_of, load_base, load_tokenizer, model_sha256, quiet
from mxd_convert.base_model.remote_code import has_own_code, trusting
from mxd_convert.base_model.swap import insert_layers
from mxd_convert.checkpoint.provenance import file_hashes
from mxd_convert.checkpoint.read import DASHBOARD, LOCAL, ONNX, REPORT, load_checkpoint
from mxd_convert.checkpoint.workspace import Workspace
from mxd_convert.commands.dashboard import write_dashboard
from mxd_convert.commands.export_onnx import export_onnx
from mxd_convert.commands.push import check_account, push
from mxd_convert.data.blocks import Blocks, check_vocabulary, prepare
from mxd_convert.errors import InputError, Stopped, disk_guard, first_line, is_out_of_memory, memory_guard
from mxd_convert.escaping import printable, say
from mxd_convert.evaluation.fidelity import evaluate_models
from mxd_convert.files import read_mapping, scratch_beside, write_json, write_text
from mxd_convert.layers import Trainable
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
from mxd_convert.recipe.schema import Recipe, is_local
from mxd_convert.report.card import write_card
from mxd_convert.report.plots import write_plots
from mxd_convert.report.schema import Report
from mxd_convert.report.write import build_report
from mxd_convert.training.distributed import agreed, lost_guard, once_a_machine
from mxd_convert.training.loop import Job, Trained, train_layers
from mxd_convert.training.tracking import finish_tracker, start_tracker

TWIN = "twin"  # folder of the dense twin, in the work folder


@dataclass(frozen=True)
class Result:
    """A finished conversion.

    report: the content of mxd_report.json. already_finished: it was there before this call. main_process: whether this process,
    of several, is the one to speak. url: where it was published (`output.push_to`). onnx_failures: what of its ONNX export is out of
    tolerance, which is then not there.
    """

    output: Path
    report: dict[str, Any]
    already_finished: bool
    main_process: bool
    url: str | None = None
    onnx_failures: tuple[str, ...] = ()


def convert(
    recipe: Recipe | str | Path | Mapping[str, Any],
    output: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    fresh: bool = False,
    quiet: bool = False,
) -> Result:
    """Runs a recipe from beginning to end, or goes on with a run of it that was cut off.

    recipe: a file, the name of a shipped recipe, a mapping or a Recipe. output: the finished checkpoint's folder, in place of the
    recipe's. overrides: {"train.lr": 1e-3}. fresh: start over, replacing a converted checkpoint or an unfinished run there. quiet: nothing on stderr.
    Raises InputError for whatever the user can put right, KeyboardInterrupt (resumable) when interrupted.
    """
    settings = dict(overrides or {})
    if output is not None:
        settings["output.dir"] = str(Path(output).expanduser().absolute())
    with once_a_machine():
        loaded = load_recipe(recipe, settings)
    with trusting(loaded.base.trust_remote_code):
        return _convert(loaded, fresh, quiet)


def _convert(recipe: Recipe, fresh: bool, quiet: bool) -> Result:
    with once_a_machine():
        plan = make_plan(recipe)
        accelerator = new_accelerator(plan)
    run = _Conversion(plan, accelerator, fresh, quiet or not accelerator.is_main_process)
    with lost_guard(accelerator.num_processes), ExitStack() as stack:
        with run.agreed():
            report = run.place.finished()
        if report is not None:
            if run.main:
                run.place.tidy()
                run.say_if_without_dashboard()
            return run.exported(run.published(Result(plan.output, report, True, run.main)))
        with run.agreed():
            if run.main:
                stack.enter_context(run.place.locked())
        stack.enter_context(disk_guard(plan.output))
        return run.exported(run.published(run.go()))


class _Conversion:
    """One run. Under torchrun every process has one: the main one prepares, assembles, evaluates and reports; all of them train."""

    def __init__(self, plan: Plan, accelerator: Accelerator, fresh: bool, quiet: bool) -> None:
        self.plan, self.recipe, self.accelerator, self.quiet = plan, plan.recipe, accelerator, quiet
        self.place = Workspace(plan.recipe, plan.output, fresh)
        self.output, self.work = self.place.output, self.place.work
        self.main = accelerator.is_main_process
        self.word = ""  # of this run, where it has several processes
        self.training = False

    def say(self, line: str) -> None:
        if not self.quiet:
            say(line)

    def say_if_without_dashboard(self) -> None:
        if self.recipe.output.dashboard and not (self.output / DASHBOARD).is_dir():
            self.say(
                f"it has no dashboard; `mxd-convert dashboard {self.output} --data TEXT --output {self.output / DASHBOARD}` writes one"
            )

    def agreed(self) -> AbstractContextManager[None]:
        return agreed(self.accelerator.num_processes, self.accelerator.process_index)

    def go(self) -> Result:
        try:
            self._check_alike()
            with self._telling_once():
                return self._go()
        except Exception:
            if self.main and (not self.training or self.accelerator.num_processes == 1):  # else others may be writing there
                self.place.forget()
            raise

    def exported(self, result: Result) -> Result:
        """The result, with its ONNX export where the recipe says so."""
        place = self.output / ONNX
        if not self.recipe.output.onnx or not self.main or place.exists():
            return result
        try:
            with scratch_beside(self.output) as scratch:
                export = export_onnx(self.output, scratch / ONNX, quiet=self.quiet)
                if export.output is not None:
                    export.output.rename(place)
        except InputError as error:
            raise InputError(
                f"{error}\nThe checkpoint itself is finished: `mxd-convert export-onnx {self.output} DIR` exports it."
            ) from error
        return replace(result, onnx_failures=tuple(export.failures))

    def published(self, result: Result) -> Result:
        """The result, on the Hub where the recipe says so."""
        name = self.recipe.output.push_to
        if name is None or not self.main:
            return result
        self.say(f"publishing to {name}")
        try:
            return replace(result, url=push(self.output, name, base=self.recipe.base.model).url)
        except InputError as error:
            raise InputError(
                f"{error}\nThe checkpoint itself is finished: `mxd-convert push {self.output} {name}` publishes it."
            ) from error

    def _go(self) -> Result:
        settings, layer = self.recipe.base, self.recipe.layer
        with self.agreed():
            if self.main:
                self._begin()
            tokenizer = load_tokenizer(settings.model, settings.revision, settings.trust_remote_code)
        for mains_turn in (True, False):  # the others read what the main process has prepared
            with self.agreed():
                if self.main == mains_turn:
                    train, held_out = prepare(self.recipe.data, tokenizer, self.work / "data", self.say)
                    check_vocabulary(train, self.plan.vocabulary)
        self.say(self._summary(train, held_out))
        trained = self._train(train)
        with self.agreed():
            if trained is not None:
                with memory_guard(
                    "out of memory while assembling and evaluating; free some, or convert fewer layers (layers: ...) or lower"
                    f" {layer.size_key} ({layer.size}). The trained layers are kept: the same command goes on from there."
                ):
                    self._finish(trained, train, held_out, tokenizer)
        return Result(self.output, read_mapping(self.output / REPORT), False, self.main)

    def _begin(self) -> None:
        """What is found out before any work is done."""
        if self.recipe.output.push_to is not None:
            check_account(self.recipe.output.push_to)
        self.place.claim(self.say)
        if not self.place.has_state():
            check_space(self.plan)
        check_processes(self.plan, self.accelerator.num_processes)
        check_memory(self.plan, self.accelerator.num_processes, begun=self.place.has_state())
        for warning in self.plan.warnings:
            self.say(f"warning: {warning}")

    def _check_alike(self) -> None:
        """Raises InputError where the processes don't all have the same recipe, or don't see the same work folder."""
        if self.accelerator.num_processes == 1:
            return
        [self.word, recipe] = broadcast_object_list([uuid.uuid4().hex, self.recipe.model_dump()])
        if self.main:
            self.place.show(self.word)
        self.accelerator.wait_for_everyone()
        with self.agreed():
            self.place.check_shown(self.word)
            if recipe != self.recipe.model_dump():
                raise InputError(
                    "recipe: not the same in all processes, once its paths and the base's revision are resolved; give all of them the same"
                    " files under the same paths, and base.revision as a commit"
                )

    @contextmanager
    def _telling_once(self) -> Iterator[None]:
        """What several processes find wrong, or one of them and then the others for want of it, is told by the first."""
        try:
            with lost_guard(self.accelerator.num_processes):
                yield
        except InputError as error:
            error.told = error.told or not self._first_to_tell()
            raise
        except KeyboardInterrupt:
            stopped = Stopped()
            stopped.told = not self._first_to_tell()
            raise stopped from None

    def _first_to_tell(self) -> bool:
        return self.accelerator.num_processes == 1 or self.place.first_to_tell(self.word)

    def _finish(self, trained: Trained, train: Blocks, held_out: Blocks, tokenizer: Any) -> None:
        settings = self.recipe.base
        original = load_base(settings, dtype="auto")
        origin = {
            "model": Path(settings.model).name if is_local(settings.model) else settings.model,
            "revision": settings.revision,
            "sha256": model_sha256(original),
            "local": is_local(settings.model),
            **({"mlp": settings.mlp.model_dump(exclude_defaults=True)} if settings.mlp is not None else {}),
            **({"own_code": True} if has_own_code(original) else {}),
        }
        folder = self._assemble(original, trained.layers, origin, self.work / "checkpoint")
        with quiet():
            tokenizer.save_pretrained(folder)
        twin = None
        if trained.twin is not None:
            twin = self._assemble(original, trained.twin.layers, origin, self.work / TWIN / "checkpoint")
        del original
        figures = self._evaluate(folder, held_out, twin)
        if self.recipe.output.dashboard:
            self._write_dashboard(folder, held_out, tokenizer)
        report = build_report(self.plan, {**origin, **card_of(settings)}, train, held_out, trained, figures)
        self._write_report(folder, report, origin)
        self.place.publish(folder)

    def _summary(self, train: Blocks, held_out: Blocks) -> str:
        layers = self.plan.layers
        resolved, processes = self.recipe.train, self.accelerator.num_processes
        many = f" over {processes} processes;" if processes > 1 else ""
        joint = f", the last {self.plan.joint_steps:,} all layers together" if self.plan.joint_steps else ""
        return (
            f"{len(layers)} layer{'s' if len(layers) > 1 else ''}, {layers[0].shape};"
            f" {self.plan.steps:,} steps of {self.plan.tokens // self.plan.steps:,} tokens (lr {resolved.lr:g}, {resolved.schedule}{joint});"
            f"{many} {len(train) * train.context:,} tokens of text, {len(held_out) * held_out.context:,} held out"
        )

    def _train(self, blocks: Blocks) -> Trained | None:
        plan = self.plan
        [room] = broadcast_object_list([budget(self.recipe)])  # grouped alike in all processes
        with self.agreed():
            check_joint(plan, room)
            start_tracker(self.accelerator, self.recipe, self.output.name)
            base = load_base(self.recipe.base, spread=self._spread(room))
            check_gradients(self.recipe, base.dtype == torch.float16)  # `dtype: auto` may find in the weights what no config says
        self.training = True
        trained = train_layers(self._job(plan, base, blocks, self.work, room))
        finish_tracker(self.accelerator)
        if self.recipe.train.twin:
            self.say("the dense twin:")
            twin = train_layers(self._job(twin_of(plan), base, blocks, self.work / TWIN, room))
            if trained is not None:
                trained.twin = twin
        return trained

    def _job(self, plan: Plan, base: Any, blocks: Blocks, folder: Path, room: int) -> Job:
        processes = self.accelerator.num_processes
        return Job(
            plan.recipe,
            base,
            plan.sites,
            plan.shapes,
            blocks,
            folder,
            self.accelerator,
            shares(plan, processes),
            lambda indices: groups(plan, indices, room, processes),
            self.quiet,
        )

    def _spread(self, room: int) -> Spread | None:
        """How a base model too large for the device is spread: over the device, the machine's memory and the disk."""
        most = base_room(self.plan, room)
        if most is None:
            return None
        self.say("the base model is too large for the memory to be had: accelerate spreads it, which is slower")
        device = self.accelerator.device
        if device.type == "cpu":
            return Spread({"cpu": most}, self.work / "offload")
        return Spread({device.index or 0: most, "cpu": int(BASE_SHARE * available("cpu"))}, self.work / "offload")

    def _assemble(self, original: Any, layers: Mapping[int, Trainable], origin: dict[str, Any], folder: Path) -> Path:
        if folder.exists():
            shutil.rmtree(folder)
        with quiet():
            insert_layers(original, layers, origin).save_pretrained(folder)
        return folder

    def _evaluate(self, folder: Path, held_out: Blocks, twin: Path | None) -> dict[str, Any]:
        converted = load_checkpoint(folder, dtype="float32")
        constant = None if twin is None else load_checkpoint(twin, dtype="float32")
        base = load_base(self.recipe.base, dtype="float32")
        device, mask_bos = self._device_to_evaluate(), self.recipe.train.mask_bos
        return evaluate_models(base, converted, self.plan.sites, held_out, mask_bos, device, self.quiet, constant)

    def _write_dashboard(self, folder: Path, held_out: Blocks, tokenizer: Any) -> None:
        converted, mask_bos = load_checkpoint(folder, dtype="float32"), self.recipe.train.mask_bos
        place = self._device_to_evaluate()
        name = self.output.name
        write_dashboard(
            folder / DASHBOARD, converted, tokenizer, held_out, name, mask_bos=mask_bos, device=place, quiet=self.quiet
        )

    def _device_to_evaluate(self) -> torch.device:
        device = self.accelerator.device
        return device if fits_for_evaluation(self.plan, device.type) else torch.device("cpu")

    def _write_report(self, folder: Path, report: Report, origin: dict[str, Any]) -> None:
        recipe_yaml = self.recipe.to_yaml()
        write_text(folder / "recipe.yaml", recipe_yaml)
        shutil.copyfile(self.work / "training_log.jsonl", folder / "training_log.jsonl")
        local: dict[str, Any] = {"base": self.recipe.base.model} if origin["local"] else {}
        data = {part: text.path for part, text in (("train", self.recipe.data.train), ("eval", self.recipe.data.eval))}
        local["data"] = {part: path for part, path in data.items() if path is not None and is_local(path)}
        write_json(folder / LOCAL, {**local, "recipe": self.recipe.fingerprint()})
        write_plots(folder, report, folder / "training_log.jsonl")
        report.files = file_hashes(folder)
        write_card(folder, report, recipe_yaml, base_on_hub=not origin["local"])
        write_json(folder / REPORT, report.to_dict())


_LEFT_OVER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "PMI_SIZE", "PMI_RANK", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def _check_launch() -> None:
    """Raise InputError where the environment speaks of several processes and no launcher has said where they meet: they never would."""
    found = [name for name in _LEFT_OVER if name in os.environ and not (name.endswith("_SIZE") and os.environ[name] == "1")]
    if found and "MASTER_ADDR" not in os.environ:
        raise InputError(
            f"the environment has {', '.join(f'{name}={printable(os.environ[name])[:20]}' for name in found)}, left by something else than a"
            f" launcher of this run; unset {'it' if len(found) == 1 else 'them'}, or launch several processes with `torchrun` or"
            " `accelerate launch`"
        )


def new_accelerator(plan: Plan) -> Accelerator:
    """The devices and processes that a plan's training uses. Raises InputError where precision or tracker can't be had."""
    # accelerate keeps one state a process: without this, a second conversion would run with the first one's precision
    _check_launch()
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    GradientState._reset_state()
    train = plan.recipe.train
    try:
        accelerator = Accelerator(
            cpu=train.device == "cpu" or not torch.cuda.is_available(),
            mixed_precision="bf16" if train.precision == "bf16" else "no",
            log_with=None if train.tracker == "none" else train.tracker,
            project_dir=str(plan.output.parent / "logs"),
            # the others wait while the main process reads text and evaluates, which may take hours
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
        )
    except (ImportError, ValueError, RuntimeError, OSError) as error:
        if is_out_of_memory(error):
            raise
        if train.precision == "bf16" and "precision" in str(error).lower():
            raise InputError(f"train.precision: {train.precision}: {first_line(error)}") from None
        if train.tracker == "none":
            asked = [name for name in sorted(os.environ) if name.startswith("ACCELERATE_")]
            hint = f"; the environment asks accelerate for more: unset {', '.join(asked)}" if asked else ""
            raise InputError(
                f"accelerate can't set up the processes and devices of this run: {first_line(error)}{hint}"
            ) from None
        raise InputError(
            f"train.tracker: {train.tracker} can't be used ({str(error).splitlines()[0]}); install it, or set train.tracker: none"
        ) from None
    torch.manual_seed(train.seed)
    return accelerator
