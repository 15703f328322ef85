"""plan -> train -> assemble -> evaluate -> report, each stage resumable.

Everything is written into `<output>.partial`, and the finished checkpoint is renamed from there, so a folder either holds a whole
result or is not there.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from filelock import FileLock, Timeout

from mxd_convert.base import Spread, load_base, load_tokenizer, model_sha256, quiet
from mxd_convert.checkpoint import LOCAL, REPORT, is_converted, load_checkpoint, read_local
from mxd_convert.data import Blocks, check_vocabulary, local_files, prepare
from mxd_convert.errors import InputError, disk_guard, memory_guard
from mxd_convert.evaluation import evaluate_models
from mxd_convert.plan import Plan, base_room, budget, check_memory, check_space, fits_for_evaluation, groups, make_plan, shares
from mxd_convert.plan.memory import BASE_SHARE, available
from mxd_convert.recipe import Recipe, is_local
from mxd_convert.recipe_file import load_recipe
from mxd_convert.report import build_report, write_card, write_plots
from mxd_convert.surgery import convert as put_layers
from mxd_convert.training import Job, Trained, train_layers

MARK = "fingerprint"  # names the recipe, base and text that a work folder belongs to
REPLACING = "replacing"  # there while a finished output is made anew
SHARED_MARK = "processes"  # what all processes must see


@dataclass(frozen=True)
class Result:
    """A finished conversion.

    report: the content of mxd_report.json. already_finished: it was there before this call. main_process: whether this process,
    of several, is the one to speak.
    """

    output: Path
    report: dict[str, Any]
    already_finished: bool
    main_process: bool


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
    if isinstance(recipe, Recipe):
        recipe = load_recipe(recipe.model_dump(), settings)
    else:
        recipe = load_recipe(recipe, settings)
    plan = make_plan(recipe)
    accelerator = _accelerator(plan)
    run = _Conversion(plan, accelerator, fresh, quiet or not accelerator.is_main_process)
    if (finished := run.finished()) is not None:
        return finished
    accelerator.wait_for_everyone()  # what there is has been looked at by all before one of them changes it
    with disk_guard(run.output), run.locked() if accelerator.is_main_process else nullcontext():
        try:
            return run.go()
        except KeyboardInterrupt:
            raise
        except BaseException:
            run.forget()
            raise


class _Conversion:
    """One run. Under torchrun every process has one: the main one prepares, assembles, evaluates and reports; all of them train."""

    def __init__(self, plan: Plan, accelerator: Accelerator, fresh: bool, quiet: bool) -> None:
        self.plan, self.recipe, self.accelerator, self.fresh, self.quiet = plan, plan.recipe, accelerator, fresh, quiet
        self.output = plan.output
        self.work = self.output.parent / f"{self.output.name}.partial"

    def say(self, line: str) -> None:
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)

    # --- where the result goes -------------------------------------------------------------------------------------------------

    def finished(self) -> Result | None:
        """The result if this very recipe has finished before. Raises InputError where something else is in the way."""
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
            content = json.loads(report.read_text())
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
        if self.work.exists() and self.accelerator.is_main_process:  # of a kill between the rename and the tidying up
            with suppress(InputError), self.locked():
                _remove(self.work)
        return Result(self.output, content, True, self.accelerator.is_main_process)

    def _is_mine(self) -> bool:
        """Whether the work folder is of this very recipe, base and text."""
        mark = self.work / MARK
        return mark.is_file() and mark.read_text() == self._mark()

    def _mark(self) -> str:
        return f"{self.recipe.fingerprint()}\n{self._inputs()}\n"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within it, no other run works on this output. The lock goes with the process, however it ends."""
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.work / "lock", timeout=0)
            with lock:
                yield
        except Timeout:
            raise InputError(
                f"output.dir: {self.output} is in use by another run; wait for it, or choose another output.dir"
            ) from None
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise InputError(f"output.dir: {error.filename or self.output} can't be written; choose another output.dir") from None

    def _claim(self) -> None:
        """Makes the work folder this recipe's: cleared with --fresh, refused where it belongs to another."""
        mark, ours = self.work / MARK, self._mark()
        theirs = mark.read_text() if mark.is_file() else ""
        if self.fresh:
            _clear(self.work, keep=("lock", MARK))
        elif self._has_state() and theirs and theirs != ours:
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

    def _has_state(self) -> bool:
        return any((self.work / "state").glob("*/step-*.json"))

    def _inputs(self) -> str:
        """A hash over names, sizes and times of the local files that the run reads: told apart if they are changed in place."""
        data, base = self.recipe.data, self.recipe.base.model
        files = [path for path in (data.train.path, data.eval.path) if path is not None and is_local(path)]
        found = [file for path in files for file in local_files(path)]
        found += sorted(Path(base).glob("*.safetensors")) if is_local(base) else []
        return hashlib.sha256(
            json.dumps([[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in found]).encode()
        ).hexdigest()

    def forget(self) -> None:
        """Removes the work folder of a run that failed before it had trained anything, so that it stands in nobody's way."""
        if self.accelerator.is_main_process and not self._has_state():
            _remove(self.work)

    # --- the stages ------------------------------------------------------------------------------------------------------------

    def go(self) -> Result:
        settings, main = self.recipe.base, self.accelerator.is_main_process
        self._check_shared()
        if main:
            self._claim()
            if not self._has_state():
                check_space(self.plan)
            check_memory(self.plan, self.accelerator.num_processes)
            for warning in self.plan.warnings:
                self.say(f"warning: {warning}")
        tokenizer = load_tokenizer(settings.model, settings.revision, settings.trust_remote_code)
        with self.accelerator.main_process_first():
            train, held_out = prepare(self.recipe.data, tokenizer, self.work / "data", self.say)
        check_vocabulary(train, self.plan.vocabulary)
        self.say(self._summary(train, held_out))
        trained = self._train(train)
        if trained is not None:
            with memory_guard(
                "out of memory while assembling and evaluating; free some, or convert fewer layers (layers: ...) or lower layer.expansion"
                f" ({self.recipe.layer.expansion}). The trained layers are kept: the same command goes on from there."
            ):
                self._finish(trained, train, held_out, tokenizer)
        self.accelerator.wait_for_everyone()
        return Result(self.output, json.loads((self.output / REPORT).read_text()), False, main)

    def _check_shared(self) -> None:
        """Raises InputError where the processes do not all see the same work folder."""
        if self.accelerator.num_processes == 1:
            return
        mark = self.work / SHARED_MARK
        [word] = broadcast_object_list([uuid.uuid4().hex])
        if self.accelerator.is_main_process:
            mark.write_text(word)
        self.accelerator.wait_for_everyone()
        if not mark.is_file() or mark.read_text() != word:
            raise InputError(
                f"output.dir: {self.output} is not on a file system that all processes see; choose another output.dir, on one that they do"
            )

    def _finish(self, trained: Trained, train: Blocks, held_out: Blocks, tokenizer: Any) -> None:
        settings = self.recipe.base
        original = load_base(settings, dtype="auto")
        origin = {
            "model": Path(settings.model).name if is_local(settings.model) else settings.model,
            "revision": settings.revision,
            "sha256": model_sha256(original),
            "local": is_local(settings.model),
        }
        folder = self._assemble(original, trained, origin, tokenizer)
        del original
        figures = self._evaluate(folder, held_out)
        report = build_report(self.plan, origin, train, held_out, trained, figures)
        self._write_report(folder, report, origin)
        self._publish(folder)

    def _summary(self, train: Blocks, held_out: Blocks) -> str:
        layers = self.plan.layers
        resolved, processes = self.recipe.train, self.accelerator.num_processes
        many = f" over {processes} processes;" if processes > 1 else ""
        return (
            f"{len(layers)} layers, {layers[0].experts:,} experts each, {layers[0].k} active;"
            f" {self.plan.steps:,} steps of {resolved.batch_tokens:,} tokens (lr {resolved.lr:g}, {resolved.schedule});"
            f"{many} {len(train) * train.context:,} tokens of text, {len(held_out) * held_out.context:,} held out"
        )

    def _train(self, blocks: Blocks) -> Trained | None:
        if self.recipe.train.tracker != "none":
            self._start_tracker()
        plan = self.plan
        processes = self.accelerator.num_processes
        [room] = broadcast_object_list([budget(self.recipe)])  # grouped alike in all processes
        base = load_base(self.recipe.base, spread=self._spread(room))
        trained = train_layers(
            Job(
                self.recipe,
                base,
                plan.sites,
                plan.experts,
                blocks,
                self.work,
                self.accelerator,
                shares(plan, processes),
                lambda indices: groups(plan, indices, room, processes),
                self.quiet,
            )
        )
        for tracker in self.accelerator.trackers:  # accelerate's end_training would end the processes' ties too
            tracker.finish()
        return trained

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

    def _start_tracker(self) -> None:
        """wandb and trackio have projects with named runs; TensorBoard has a folder a run, under `logs` beside the output."""
        tracker, name = self.recipe.train.tracker, self.output.name
        project = name if tracker == "tensorboard" else "mxd-convert"
        run = {} if tracker == "tensorboard" else {tracker: {"name": name}}
        self.accelerator.init_trackers(project, config={"recipe": self.recipe.to_yaml()}, init_kwargs=run)

    def _assemble(self, original: Any, trained: Trained, origin: dict[str, Any], tokenizer: Any) -> Path:
        folder = self.work / "checkpoint"
        if folder.exists():
            shutil.rmtree(folder)
        with quiet():
            put_layers(original, trained.layers, origin).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder

    def _evaluate(self, folder: Path, held_out: Blocks) -> dict[str, Any]:
        converted = load_checkpoint(folder, dtype="float32")
        base = load_base(self.recipe.base, dtype="float32")
        device = self.accelerator.device
        if not fits_for_evaluation(self.plan, device.type):
            device = torch.device("cpu")
        return evaluate_models(base, converted, self.plan.sites, held_out, self.recipe.train.mask_bos, device, self.quiet)

    def _write_report(self, folder: Path, report: dict[str, Any], origin: dict[str, Any]) -> None:
        recipe_yaml = self.recipe.to_yaml()
        (folder / "recipe.yaml").write_text(recipe_yaml)
        shutil.copyfile(self.work / "training_log.jsonl", folder / "training_log.jsonl")
        local = {"base": self.recipe.base.model} if origin["local"] else {}
        (folder / LOCAL).write_text(json.dumps({**local, "recipe": self.recipe.fingerprint()}, indent=2) + "\n")
        write_plots(folder, report, folder / "training_log.jsonl")
        write_card(folder, report, recipe_yaml, base_on_hub=not origin["local"])
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")

    def _publish(self, folder: Path) -> None:
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


def _is_ours(folder: Path) -> bool:
    """Whether a work folder is one of ours: it has our mark, or nothing but what comes before the mark."""
    before = {"lock", f"{MARK}.tmp", SHARED_MARK}
    return folder.is_dir() and ((folder / MARK).is_file() or {path.name for path in folder.iterdir()} <= before)


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


def _accelerator(plan: Plan) -> Accelerator:
    # accelerate keeps one state a process: without this, a second conversion would run with the first one's precision
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
    except (ImportError, ValueError) as error:
        if train.tracker == "none":
            raise InputError(f"train.precision: {train.precision}: {str(error).splitlines()[0]}") from None
        raise InputError(
            f"train.tracker: {train.tracker} can't be used ({str(error).splitlines()[0]}); install it, or set train.tracker: none"
        ) from None
    torch.manual_seed(train.seed)
    return accelerator
