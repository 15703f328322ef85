"""One pass over the text for a group of layers: steps, log and state."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from mxd_convert.errors import NotFinite
from mxd_convert.layers import LayerSpec, Trainable, new_layer
from mxd_convert.recipe.presets import is_warm
from mxd_convert.recipe.schema import Recipe
from mxd_convert.training.balance import balances_of, tensors_of
from mxd_convert.training.interrupt import Interrupt
from mxd_convert.training.layer_step import forward_backward
from mxd_convert.training.log import NAME, append_line, cut_log
from mxd_convert.training.optimiser import Optimiser
from mxd_convert.training.progress import TrainingProgress
from mxd_convert.training.state import drop_damaged, load_state, save_state
from mxd_convert.training.stream import Activations, Source
from mxd_convert.training.token_init import init_from_tokens
from mxd_convert.training.tracking import track
from mxd_convert.training.warm_start import copy_layers
from mxd_convert.training.window import Window

SAVE_SECONDS = 60.0  # between two saves, unless `checkpoint_every` comes first
Figures = tuple[float, float, dict[str, float]]  # mean FVU, dead share, shares of the time


def make_layer(shape: LayerSpec, seed: int, index: int, init: str | None = None) -> Trainable:
    """Return a new layer. Its initialisation depends only on the seed and the layer's index, not on other layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * 1_000_003 + index)
        return new_layer(shape, init or "paper")


def active_experts(step: int, steps: int, first: int, last: int) -> int:
    """Return the number of active experts at `step` (from 0): from `first` linearly down to `last` at half of the steps.

    A single step has `last`, because later stages keep the value of the last step.
    """
    return last if steps == 1 else last + round((first - last) * max(0.0, 1.0 - 2.0 * step / steps))


@dataclass(frozen=True)
class Pass:
    """One of this process's passes over the text. layers: name of the group. number: from 1. of: number of passes."""

    layers: str
    number: int
    of: int

    @property
    def title(self) -> str:
        """Return the title for the progress; empty for a single pass over all layers."""
        return f"{self.layers} (pass {self.number} of {self.of})" if self.of > 1 else self.layers


class Stage:
    """The training of the layers at `source.sites` in one pass: `prepare`, then `advance` to the last step, or `train` for both.

    Args:
        recipe: with its `train` keys resolved.
        source: text, base model and sites.
        shapes: of the layers, by index.
        folder: for log and state. `prepare` resumes from the state, if there is one.
        accelerator: devices and processes.
        together: whether the accelerator's processes share each batch.
        quiet: whether to print nothing.
        this: number and name of the pass.
        activations: shared with other stages that read the same batches.
    """

    first_step = 0  # steps that the layers have taken in earlier stages

    def __init__(
        self,
        recipe: Recipe,
        source: Source,
        shapes: dict[int, LayerSpec],
        folder: Path,
        accelerator: Accelerator,
        together: bool,
        quiet: bool,
        this: Pass,
        activations: Activations | None = None,
    ) -> None:
        train = recipe.train
        self.recipe, self.source, self.folder, self.accelerator = recipe, source, folder, accelerator
        self.together, self.quiet, self.this = together, quiet or not accelerator.is_main_process, this
        self.writes = accelerator.is_main_process or not together
        self.device = accelerator.device
        self.steps, self.step_tokens = source.steps, source.rows_a_step * source.blocks.context
        self.layers = self._make_layers(shapes)
        self.windows = {index: Window.empty(layer, self.device) for index, layer in self.layers.items()}
        self.balances = balances_of(self.layers, train.balance or 0.0, self._sum_over_processes, self.device)
        self.losses: dict[int, list[Tensor]] = {index: [] for index in self.layers}  # of the steps since the last log line
        lr, warmup, schedule = self._rates()
        self.optimiser = Optimiser(
            self.layers,
            lr,
            self.steps,
            warmup,
            schedule,
            moments=train.moments,
            seed=train.seed,
            defer=not together,
        )
        self.names: dict[nn.Parameter, str] = {
            parameter: f"{index}/{name}" for index, layer in self.layers.items() for name, parameter in layer.named_parameters()
        }
        self.activations = activations or Activations(source, self.device)
        self.log_path = folder / NAME
        self.resumed_at: list[int] = []
        self.unsent: list[list[int]] = []  # ranges of steps (first, last], taken by a process without a tracker
        self.done = self.began = 0
        self.seconds = self.before = 0.0
        self.start = self.logged_at = time.monotonic()
        self.logged = 0
        self.stopping = self.saving = False
        self.saved_at, self.save_seconds = self.start, 0.0

    # --- methods that other kinds of stages override ----------------------------------------------------------------------------

    def _make_layers(self, shapes: dict[int, LayerSpec]) -> dict[int, Trainable]:
        """Return the layers by index, on the device."""
        train = self.recipe.train
        return {
            site.index: make_layer(shapes[site.index], train.seed, site.index, train.init).to(self.device)
            for site in self.source.sites
        }

    def _rates(self) -> tuple[float, int, str]:
        """Return peak learning rate, warm-up steps and schedule."""
        train = self.recipe.train
        assert train.lr is not None
        assert train.warmup_steps is not None
        assert train.schedule is not None
        return train.lr, train.warmup_steps, train.schedule

    def _initialise(self) -> None:
        """Initialise from tokens or from another conversion, if the recipe says so. Called for a stage that has no saved state."""
        start, init = time.monotonic(), self.recipe.train.init
        if is_warm(init):
            copy_layers(self.layers, init)
        if init == "tokens":
            self._choose_k(0)
            if not self.quiet and any(layer.n_experts for layer in self.layers.values()):
                print("initialising experts from tokens", file=sys.stderr, flush=True)
            init_from_tokens(self.layers, self.activations)
            for parameter in self.names if self.together else ():  # equal bit for bit in all processes
                parameter.data.copy_(broadcast(parameter.data))
            self.seconds = time.monotonic() - start

    def _forward_backward(self, step: int, interrupt: Interrupt) -> None:
        """Run forward and backward of a step for all layers, and record their losses."""
        batch = self.activations.batch(step)
        counted_B = batch.counted_B
        total = self._agree(counted_B.sum(), interrupt)
        self._choose_k(step)
        train, l1 = self.recipe.train, self.recipe.layer.l1
        moved = self.activations.moved(step) if train.jacobian else {}
        # a mean over this process's tokens, weighted by its share of them: the sum over processes is the mean over all
        share = counted_B.sum() / total if self.together else None
        for index, layer in self.layers.items():
            x_BI, y_BO = (tensor.float() for tensor in batch.activations[index])
            balance = (self.balances[index], batch.figures_B) if index in self.balances else None
            terms = train.jacobian or 0.0, moved.get(index), balance
            loss = forward_backward(layer, x_BI, y_BO, counted_B, train.precision, l1, share, self.windows[index], *terms)
            self.losses[index].append(loss)

    def _advice(self) -> str:
        """Return the advice for a loss that is not finite."""
        train = self.recipe.train
        return f"Lower train.lr ({train.lr:g}) or lengthen train.warmup_steps ({train.warmup_steps})"

    def _extra_figures(self) -> dict[str, float]:
        """Return the extra log fields and reset their sums."""
        return {}

    def _extra_facts(self) -> dict[str, Any]:
        """Return the extra fields of a saved state."""
        return {}

    def _restore_extra(self, facts: dict[str, Any]) -> None:
        """Restore the extra fields of a saved state."""

    # --- the loop --------------------------------------------------------------------------------------------------------------

    def train(self, interrupt: Interrupt) -> None:
        """Prepare, then train to the last step.

        Raises KeyboardInterrupt after saving if interrupted, InputError if a loss is not finite.
        """
        self.prepare()
        if self.done == self.steps:
            return
        if self.done and not self.quiet:
            of = f" of {self.this.title}" if self.this.title else ""
            print(f"resumed at step {self.done:,} of {self.steps:,}{of}", file=sys.stderr, flush=True)
        a_pass = self.steps * self.step_tokens
        before = (self.this.number - 1) * a_pass
        with TrainingProgress(
            self.this.title, self.this.of * a_pass, before + self.done * self.step_tokens, self.quiet
        ) as progress:
            self.start_clock()
            while self.done < self.steps:
                if (figures := self.advance(interrupt)) is not None:
                    progress.figures(*figures)
                progress.update(before + self.done * self.step_tokens)
                if self.stopping:
                    raise KeyboardInterrupt

    def start_clock(self) -> None:
        """Start the clock before the first `advance` of this process."""
        self.start = self.logged_at = time.monotonic()
        self.before, self.logged = self.seconds, self.done

    def advance(self, interrupt: Interrupt) -> Figures | None:
        """Take one step, then write log and state if they are due. Returns the figures at a log step, else None.

        Raises InputError if a loss is not finite.
        """
        figures = None
        self._step(self.done, interrupt)
        self.done += 1
        self.seconds = self.before + time.monotonic() - self.start
        if self.done % self.recipe.train.log_every == 0 or self.done == self.steps:
            now = time.monotonic()
            rate = (self.done - self.logged) * self.step_tokens / max(now - self.logged_at, 1e-9)
            self.logged_at, self.logged = now, self.done
            figures = (*self._log(rate), self._shares(now - self.start))
        due = self.done % self.recipe.train.checkpoint_every == 0 or self.saving
        if due or self.done == self.steps or self.stopping:
            self.save()
        return figures

    def _step(self, step: int, interrupt: Interrupt) -> None:
        """Learn from one batch and update the parameters."""
        self._forward_backward(step, interrupt)
        if self.together:
            for parameter in self.names:
                if parameter.grad is not None:
                    parameter.grad = self._sum_over_processes(parameter.grad)
        self.optimiser.step(step)

    def _choose_k(self, step: int) -> None:
        """Set the number of active experts of all layers for a step."""
        for layer in self.layers.values():
            if layer.n_experts:
                layer.k = active_experts(step, self.steps, self.recipe.train.k_init or self.recipe.layer.k, self.recipe.layer.k)

    def _agree(self, counted: Tensor, interrupt: Interrupt) -> Tensor:
        """Return the number of counted tokens of all processes, which also agree on saving and on stopping after this step."""
        saving = self.writes and self._save_is_due()
        if not self.together:
            self.saving, self.stopping = saving, interrupt.requested
            return counted
        flags = (torch.tensor(int(flag), device=self.device) for flag in (saving, interrupt.requested))
        total, save, stop = self._sum_over_processes(torch.stack([counted, *flags]))
        self.saving, self.stopping = bool(save), bool(stop)
        return total.clamp_min(1)

    def _sum_over_processes(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, "sum") if self.together else tensor

    # --- log and state ---------------------------------------------------------------------------------------------------------

    def _log(self, rate: float) -> tuple[float, float]:
        """Write a log line and clear the windows. Returns mean FVU and dead share. Raises InputError if a loss is not finite."""
        figures: dict[str, dict[str, float]] = {}
        for index, window in self.windows.items():
            if self.together:
                for name, tensor in window.tensors().items():
                    summed = self._sum_over_processes(tensor.double())
                    setattr(window, name, summed > 0 if name == "alive" else summed)
            figures[str(index)] = window.figures()
            if self._sum_over_processes((~torch.stack(self.losses[index]).isfinite()).sum()) > 0:
                raise self._not_finite(index)
            window.clear()
            self.losses[index].clear()
        lr = self.optimiser.rate(self.done - 1)
        line: dict[str, Any] = {
            "step": self.first_step + self.done,
            "tokens": (self.first_step + self.done) * self.step_tokens,
            "lr": lr,
            "tokens_per_second": round(rate, 1),
            **self._extra_figures(),
            "layers": figures,
        }
        if self.writes:
            append_line(self.log_path, line)
        fvu, dead = (sum(layer[key] for layer in figures.values()) / len(figures) for key in ("fvu", "dead_fraction"))
        track(self.accelerator, line, self.this.layers)
        return fvu, dead

    def _shares(self, seconds: float) -> dict[str, float]:
        """Return the shares of the time since the start: forwards of the base, steps of the layers, and reading text."""
        shares = {name: spent / max(seconds, 1e-9) for name, spent in self.activations.seconds.items()}
        return {"base": shares["base"], "layers": max(0.0, 1.0 - sum(shares.values())), "data": shares["data"]}

    def _not_finite(self, index: int) -> NotFinite:
        """Return the error for a layer with a loss or parameter that is not finite."""
        losses = self.losses[index]
        finite = [bool(loss.isfinite()) for loss in losses]
        step = self.done - len(losses) + (finite.index(False) if False in finite else len(losses) - 1) + 1
        good = [int(path.stem.removeprefix("step-")) for path in self.folder.glob("step-*.json")]
        kept = f"; the last good state is at step {self.first_step + max(good)}" if good else ""
        advice = self._advice()
        if not self.windows[index].output_squares.isfinite():  # then the learning rate is not the cause
            advice = (
                f"The base model's MLP output is not finite: set base.dtype ({self.recipe.base.dtype}) to bfloat16 or float32"
            )
        error = NotFinite(
            f"layer {index}: the loss is not finite at step {self.first_step + step}{kept}. {advice}, and start over with --fresh."
        )
        error.reported_elsewhere = not self.writes  # all processes that share a batch find the same
        return error

    def _save_is_due(self) -> bool:
        """Return whether a minute has passed since the last save, or longer if saves would take more than 5% of the time."""
        return time.monotonic() - self.saved_at > max(SAVE_SECONDS, 20 * self.save_seconds)

    def save(self) -> None:
        """Save the state, from which a later call resumes. Raises InputError if a parameter is not finite."""
        start = time.monotonic()
        for index, layer in self.layers.items():  # a run must be able to resume from any saved state
            if not all(parameter.isfinite().all() for parameter in layer.parameters()):
                raise self._not_finite(index)
        windows = {
            f"{index}/window/{name}": self._sum_over_processes(tensor.double()).to(tensor.dtype)
            for index, window in self.windows.items()
            for name, tensor in window.tensors().items()
        }
        if self.writes:
            tensors: dict[str, Tensor] = {name: parameter.detach() for parameter, name in self.names.items()}
            if self.done < self.steps:  # finished layers need only their parameters
                tensors |= self.optimiser.tensors(self.names) | windows | tensors_of(self.balances)
            facts = {
                "steps": self.steps,
                "seconds": self.seconds,
                "resumed_at_steps": self.resumed_at,
                "unsent": self.unsent + ([] if self.accelerator.is_main_process else [[self.began, self.done]]),
                "layers": list(self.layers),
                **self._extra_facts(),
            }
            save_state(self.folder, self.done, tensors, facts, self.recipe.fingerprint())
        if self.together:
            self.accelerator.wait_for_everyone()
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - start

    def prepare(self) -> None:
        """Resume from the newest undamaged state in the folder, or initialise the layers without one. Call once, before a step."""
        found = load_state(self.folder, self.recipe.fingerprint())
        if found is not None and found[2]["layers"] == list(self.layers):
            self._restore(*found)
            return
        if self.writes:
            self._drop_damaged(-1, "training starts over")
            self.log_path.unlink(missing_ok=True)
        self._initialise()

    def _restore(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Restore the state after `step` steps: parameters, and for an unfinished stage also windows and optimiser."""
        self.done = step
        if self.writes:
            self._drop_damaged(step, f"training resumes from the state of step {step:,}")
            cut_log(self.log_path, facts["log"])
        self._restore_extra(facts)
        with torch.no_grad():
            for parameter, name in self.names.items():
                parameter.copy_(tensors[name])
            if step == self.steps:
                return
            for index, window in self.windows.items() if self.writes else ():  # saved sums are over all processes
                for name, tensor in window.tensors().items():
                    tensor.copy_(tensors[f"{index}/window/{name}"])
            self.optimiser.restore(self.names, tensors)
            for name, tensor in tensors_of(self.balances).items():
                tensor.copy_(tensors[name])
        self.seconds = facts["seconds"]
        self.resumed_at, self.began = [*facts["resumed_at_steps"], step], step
        self.unsent = facts.get("unsent", [])

    def _drop_damaged(self, step: int, then: str) -> None:
        """Remove the states after `step`, which are damaged, and report it. then: the consequence, for the message."""
        if (damaged := drop_damaged(self.folder, step)) and not self.quiet:
            print(f"{damaged[-1]}: this saved state or its log is damaged; {then}", file=sys.stderr, flush=True)
