"""The training loop: one forward of the base model a step serves every layer; each layer learns from its own activations."""

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mxd_convert.architectures import Site
from mxd_convert.data import Blocks, block_order
from mxd_convert.errors import InputError, disk_guard
from mxd_convert.harvest import harvest
from mxd_convert.layers import MxD, normalised_mse
from mxd_convert.recipe import Recipe
from mxd_convert.training.optimiser import Optimiser
from mxd_convert.training.presets import steps_of
from mxd_convert.training.progress import TrainingProgress
from mxd_convert.training.state import load_state, save_state
from mxd_convert.training.window import Window

SAVE_SECONDS = 60.0


@dataclass
class Trained:
    """The layers by index, on the CPU in float32, and what their training cost."""

    layers: dict[int, MxD]
    steps: int
    tokens: int
    seconds: float
    resumed_at_steps: list[int] = field(default_factory=list)


def make_layer(recipe: Recipe, site: Site, n_experts: int) -> MxD:
    """A new layer for a site. Its initialisation depends on the seed and the layer's index only, not on what else is trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed * 1_000_003 + site.index)
        return MxD(
            site.d_in,
            recipe.layer.hidden or site.d_hidden,
            site.d_out,
            n_experts,
            recipe.layer.k,
            activation=recipe.layer.activation or site.activation,
            glu=site.glu,
            sparsity=recipe.layer.sparsity,
            skip=recipe.layer.skip,
        )


@dataclass(frozen=True)
class Job:
    """What is to be trained on what. recipe: with its `train` keys resolved. experts: N by layer index. folder: for log and state."""

    recipe: Recipe
    base: nn.Module
    sites: list[Site]
    experts: dict[int, int]
    blocks: Blocks
    folder: Path
    accelerator: Accelerator
    quiet: bool = False


def train_layers(job: Job) -> Trained:
    """Trains a layer for every site on the activations of the base; goes on from the state in the job's folder if there is one.

    Writes `training_log.jsonl` and `state/` there. Raises InputError for a loss that is not finite and for a full disk,
    KeyboardInterrupt (after saving) when interrupted.
    """
    run = _Run(job)
    with run.interruptible():
        run.train()
    layers = {index: layer.cpu() for index, layer in run.layers.items()}
    return Trained(layers, run.steps, run.steps * run.step_tokens, run.seconds, run.resumed_at)


class _Run:
    def __init__(self, job: Job) -> None:
        recipe, base, sites, blocks, accelerator = job.recipe, job.base, job.sites, job.blocks, job.accelerator
        train = recipe.train
        assert train.batch_tokens is not None
        assert train.lr is not None
        assert train.warmup_steps is not None
        assert train.schedule is not None
        self.recipe, self.sites, self.blocks, self.accelerator = recipe, sites, blocks, accelerator
        self.folder, self.quiet = job.folder, job.quiet
        self.device = accelerator.device
        self.base = base.to(self.device)
        self.layers = {site.index: make_layer(recipe, site, job.experts[site.index]).to(self.device) for site in sites}
        self.windows = {index: Window.empty(layer, self.device) for index, layer in self.layers.items()}
        self.rows_a_step = train.batch_tokens // blocks.context
        self.step_tokens = self.rows_a_step * blocks.context
        if self.rows_a_step < accelerator.num_processes:
            raise InputError(
                f"train.batch_tokens: {train.batch_tokens} tokens are {self.rows_a_step} blocks of {blocks.context}, fewer than the"
                f" {accelerator.num_processes} processes; raise train.batch_tokens"
            )
        self.steps = steps_of(recipe.data.tokens, train.batch_tokens, blocks.context)
        alone = accelerator.num_processes == 1
        self.optimiser = Optimiser(self.layers.values(), train.lr, self.steps, train.warmup_steps, train.schedule, defer=alone)
        self.names = {p: f"{index}/{name}" for index, layer in self.layers.items() for name, p in layer.named_parameters()}
        self.log_path = job.folder / "training_log.jsonl"
        self.resumed_at: list[int] = []
        self.done = 0
        self.seconds = 0.0
        self.told_to_stop = self.stopping = False
        self.saved_at, self.save_seconds = time.monotonic(), 0.0
        self._restore()

    # --- the loop --------------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        train = self.recipe.train
        last_log, last_logged_step = time.monotonic(), self.done
        start, before = time.monotonic(), self.seconds
        quiet = self.quiet or not self.accelerator.is_main_process
        if self.done and self.done < self.steps and not quiet:
            print(f"resumed at step {self.done}", file=sys.stderr, flush=True)
        with TrainingProgress(self.steps * self.step_tokens, self.done * self.step_tokens, quiet) as progress:
            while self.done < self.steps:
                self._step(self.done)
                self.done += 1
                self.seconds = before + time.monotonic() - start
                fvu = None
                if self.done % train.log_every == 0 or self.done == self.steps:
                    now = time.monotonic()
                    rate = (self.done - last_logged_step) * self.step_tokens / max(now - last_log, 1e-9)
                    last_log, last_logged_step = now, self.done
                    fvu = self._log(rate)
                progress.update(self.done * self.step_tokens, fvu)
                if self.done % train.checkpoint_every == 0 or self.done == self.steps or self.stopping or self._save_is_due():
                    self._save()
                if self.stopping:
                    raise KeyboardInterrupt
        if self.told_to_stop and self.accelerator.num_processes == 1:  # during the last step, which has been saved
            raise KeyboardInterrupt

    def _step(self, step: int) -> None:
        ids_BT = self._batch(step).to(self.device)
        counted_B = self.blocks.counted(ids_BT, self.recipe.train.mask_bos).flatten()
        activations = harvest(self.base, self.sites, ids_BT)
        total = self._agree(counted_B.sum())
        for index, layer in self.layers.items():
            seen = activations.pop(index)  # freed as soon as its layer is done
            x_BI, y_BO = seen.inputs.flatten(0, 1).float(), seen.outputs.flatten(0, 1).float()
            with self.accelerator.autocast():
                codes = layer.encode(x_BI)
                output_BO = layer.combine(x_BI, codes)
            loss = normalised_mse(output_BO, y_BO, counted_B)
            objective = loss
            if layer.sparsity == "l1":
                objective = loss + self.recipe.layer.l1 * layer.penalty(codes, counted_B)
            # the loss is a mean over this process's tokens; weighted by its share, the sum over processes is the mean over all
            (objective * (counted_B.sum() / total) if self.accelerator.num_processes > 1 else objective).backward()
            self.windows[index].add(loss.detach(), output_BO, y_BO, codes, counted_B)
        if self.accelerator.num_processes > 1:
            for parameter in self.names:
                if parameter.grad is not None:
                    parameter.grad = self._sum_over_processes(parameter.grad)
        self.optimiser.step(step)

    def _agree(self, counted: Tensor) -> Tensor:
        """The tokens that count in all processes. With the same message they agree on stopping, if any of them was told to."""
        if self.accelerator.num_processes == 1:
            self.stopping = self.told_to_stop
            return counted
        told = torch.tensor(int(self.told_to_stop), device=self.device)
        total, stop = self._sum_over_processes(torch.stack([counted, told]))
        self.stopping = bool(stop)
        return total

    def _batch(self, step: int) -> Tensor:
        rows = block_order(len(self.blocks), step * self.rows_a_step, self.rows_a_step, self.recipe.train.seed)
        return self.blocks.take(rows[self.accelerator.process_index :: self.accelerator.num_processes])

    def _sum_over_processes(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, "sum") if self.accelerator.num_processes > 1 else tensor

    # --- log and state ---------------------------------------------------------------------------------------------------------

    def _log(self, rate: float) -> float:
        """Writes a line and clears the windows. Returns the mean FVU. Raises InputError where a loss is not finite."""
        figures: dict[str, dict[str, float]] = {}
        for index, window in self.windows.items():
            if self.accelerator.num_processes > 1:
                for name, tensor in window.tensors().items():
                    summed = self._sum_over_processes(tensor.double())
                    setattr(window, name, summed > 0 if name == "alive" else summed)
            figures[str(index)] = window.figures()
            if not math.isfinite(figures[str(index)]["loss"]):
                raise self._not_finite(index)
            window.clear()
        fvu = sum(layer["fvu"] for layer in figures.values()) / len(figures)
        lr = self.optimiser.rate(self.done - 1)
        line = {
            "step": self.done,
            "tokens": self.done * self.step_tokens,
            "lr": lr,
            "tokens_per_second": round(rate, 1),
            "layers": figures,
        }
        if self.accelerator.is_main_process:
            with disk_guard(self.folder), self.log_path.open("a") as log:
                log.write(json.dumps(line) + "\n")
        if self.recipe.train.tracker != "none":
            flat = {f"layer_{index}/{name}": value for index, layer in figures.items() for name, value in layer.items()}
            self.accelerator.log({"lr": lr, "tokens_per_second": rate, "mean_fvu": fvu, **flat}, step=self.done)
        return fvu

    def _not_finite(self, index: int) -> InputError:
        return InputError(
            f"layer {index}: the loss is not finite at step {self.done}; lower train.lr ({self.recipe.train.lr:g}) or lengthen"
            f" train.warmup_steps ({self.recipe.train.warmup_steps}), and start over with --fresh"
        )

    def _save_is_due(self) -> bool:
        """A minute after the last save, or later where saving would take more than a twentieth of the time."""
        if self.accelerator.num_processes > 1:  # each has a clock of its own; they save by the step alone
            return False
        return time.monotonic() - self.saved_at > max(SAVE_SECONDS, 20 * self.save_seconds)

    def _save(self) -> None:
        start = time.monotonic()
        for index, layer in self.layers.items():  # what is kept must be good to go on from
            if not all(parameter.isfinite().all() for parameter in layer.parameters()):
                raise self._not_finite(index)
        windows = {
            f"{index}/window/{name}": self._sum_over_processes(tensor.double()).to(tensor.dtype)
            for index, window in self.windows.items()
            for name, tensor in window.tensors().items()
        }
        if self.accelerator.is_main_process:
            tensors: dict[str, Tensor] = {name: parameter.detach() for parameter, name in self.names.items()}
            tensors |= self.optimiser.tensors(self.names) | windows
            facts: dict[str, Any] = {"seconds": self.seconds, "resumed_at_steps": self.resumed_at}
            save_state(self.folder / "state", self.done, tensors, facts, self.recipe.fingerprint())
        self.accelerator.wait_for_everyone()
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - start

    def _restore(self) -> None:
        found = load_state(self.folder / "state", self.recipe.fingerprint())
        if found is None:
            if self.accelerator.is_main_process:
                self.log_path.unlink(missing_ok=True)
            return
        self.done, tensors, facts = found
        with torch.no_grad():
            for parameter, name in self.names.items():
                parameter.copy_(tensors[name])
            for index, window in self.windows.items() if self.accelerator.is_main_process else ():  # the sums of all processes
                for name, tensor in window.tensors().items():
                    tensor.copy_(tensors[f"{index}/window/{name}"])
        self.optimiser.restore(self.names, tensors)
        self.seconds = facts["seconds"]
        self.resumed_at = list(facts["resumed_at_steps"])
        if self.done < self.steps:
            self.resumed_at.append(self.done)
        if self.accelerator.is_main_process:
            self._cut_log()

    def _cut_log(self) -> None:
        """Drops the lines of steps that will be done again."""
        if not self.log_path.is_file():
            return
        kept = []
        for line in self.log_path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= self.done:
                    kept.append(line + "\n")
            except (ValueError, KeyError):  # the line that the kill cut short
                continue
        temporary = self.log_path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(self.log_path)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within it, the first Ctrl-C or SIGTERM saves the state after the current step and then interrupts; a second one at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            if self.told_to_stop:
                raise KeyboardInterrupt
            self.told_to_stop = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
