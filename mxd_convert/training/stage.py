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
from mxd_convert.layers import LayerSpec, Trainable, new_layer, normalised_mse
from mxd_convert.recipe.schema import Recipe
from mxd_convert.training.interrupt import Interrupt
from mxd_convert.training.log import NAME, append_line, cut_log
from mxd_convert.training.optimiser import Optimiser
from mxd_convert.training.progress import TrainingProgress
from mxd_convert.training.state import drop_damaged, load_state, save_state
from mxd_convert.training.stream import Activations, Source
from mxd_convert.training.token_init import init_from_tokens
from mxd_convert.training.tracking import track
from mxd_convert.training.window import Window

SAVE_SECONDS = 60.0
Figures = tuple[float, float, dict[str, float]]  # mean FVU, dead share, shares of the time


def make_layer(shape: LayerSpec, seed: int, index: int, init: str | None = None) -> Trainable:
    """A new layer. Its initialisation depends on the seed and the layer's index only, not on what else is trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * 1_000_003 + index)
        return new_layer(shape, init or "paper")


def active_experts(step: int, steps: int, first: int, last: int) -> int:
    """How many experts are active at `step` (from 0): `first` at the start, then evenly fewer, `last` from half of the steps on.

    A single step takes `last`: whatever comes after a stage goes on with what its last step had.
    """
    return last if steps == 1 else last + round((first - last) * max(0.0, 1.0 - 2.0 * step / steps))


def learn(
    layer: Trainable,
    x_BI: Tensor,
    y_BO: Tensor,
    counted_B: Tensor,
    precision: str,
    l1: float,
    share: Tensor | None,
    window: Window,
) -> Tensor:
    """Forward and backward of one layer on one batch; adds to the window. Returns the loss, a scalar. share: of the loss in the whole."""
    with torch.autocast(x_BI.device.type, torch.bfloat16, enabled=precision == "bf16"):
        codes = layer.encode(x_BI)
        output_BO = layer.combine(x_BI, codes)
    loss = normalised_mse(output_BO, y_BO, counted_B)
    objective = loss + l1 * layer.penalty(codes, counted_B) if isinstance(codes, Tensor) else loss
    (objective if share is None else objective * share).backward()
    window.add(loss.detach(), output_BO.detach(), y_BO, codes, counted_B)
    return loss.detach()


@dataclass(frozen=True)
class Pass:
    """One of this process's passes over the text. layers: what it trains, in words. number: from 1. of: how many there are."""

    layers: str
    number: int
    of: int

    @property
    def title(self) -> str:
        """For the progress; empty where there is but one pass, over all layers."""
        return f"{self.layers} (pass {self.number} of {self.of})" if self.of > 1 else self.layers


class Stage:
    """Trains the layers of `source.sites` together. Goes on from the state in `folder` if there is one.

    together: whether the accelerator's processes share out every batch; else this process is on its own. activations: where other stages
    read the same ones.
    """

    first_step = 0  # steps that the layers have taken before

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
        self.unsent: list[list[int]] = []  # steps, from after to, that a process without a tracker took
        self.done = self.began = 0
        self.seconds = self.before = 0.0
        self.start = self.logged_at = time.monotonic()
        self.logged = 0
        self.stopping = self.saving = False
        self.saved_at, self.save_seconds = time.monotonic(), 0.0
        self._restore()

    # --- what a stage of another kind does in its own way ------------------------------------------------------------------------

    def _make_layers(self, shapes: dict[int, LayerSpec]) -> dict[int, Trainable]:
        train = self.recipe.train
        return {
            site.index: make_layer(shapes[site.index], train.seed, site.index, train.init).to(self.device)
            for site in self.source.sites
        }

    def _rates(self) -> tuple[float, int, str]:
        """Peak learning rate, steps of warm-up, schedule."""
        train = self.recipe.train
        assert train.lr is not None
        assert train.warmup_steps is not None
        assert train.schedule is not None
        return train.lr, train.warmup_steps, train.schedule

    def _begin(self) -> None:
        """What comes before the first step of all."""
        if self.recipe.train.init == "tokens":
            self._choose_k(0)
            if not self.quiet and any(layer.n_experts for layer in self.layers.values()):
                print("choosing the tokens that experts start as", file=sys.stderr, flush=True)
            init_from_tokens(self.layers, self.activations)
            for parameter in self.names if self.together else ():  # the same to the last bit in all processes
                parameter.data.copy_(broadcast(parameter.data))
            self.seconds = time.monotonic() - self.start

    def _learn(self, step: int, interrupt: Interrupt) -> None:
        """Forward and backward of a step, for all layers; their losses."""
        batch = self.activations.batch(step)
        counted_B = batch.counted_B
        total = self._agree(counted_B.sum(), interrupt)
        self._choose_k(step)
        for index, layer in self.layers.items():
            x_BI, y_BO = (tensor.float() for tensor in batch.activations[index])
            # the loss is a mean over this process's tokens; weighted by its share, the sum over processes is the mean over all
            share = counted_B.sum() / total if self.together else None
            precision, l1 = self.recipe.train.precision, self.recipe.layer.l1
            self.losses[index].append(learn(layer, x_BI, y_BO, counted_B, precision, l1, share, self.windows[index]))

    def _advice(self) -> str:
        """What to do about a loss that is not finite."""
        train = self.recipe.train
        return f"Lower train.lr ({train.lr:g}) or lengthen train.warmup_steps ({train.warmup_steps})"

    def _more(self) -> dict[str, float]:
        """What a log line has besides; begins anew."""
        return {}

    def _facts(self) -> dict[str, Any]:
        """What a saved state has besides."""
        return {}

    def _take(self, facts: dict[str, Any]) -> None:
        """The same, of a state that is gone on from."""

    # --- the loop --------------------------------------------------------------------------------------------------------------

    def train(self, interrupt: Interrupt) -> None:
        """Runs to the end. Raises KeyboardInterrupt, after saving, when told to; InputError where a loss is not finite."""
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
            self.begin()
            while self.done < self.steps:
                if (figures := self.advance(interrupt)) is not None:
                    progress.figures(*figures)
                progress.update(before + self.done * self.step_tokens)
                if self.stopping:
                    raise KeyboardInterrupt

    def begin(self) -> None:
        """Before the first `advance` of this process."""
        self.start = self.logged_at = time.monotonic()
        self.before, self.logged = self.seconds, self.done

    def advance(self, interrupt: Interrupt) -> Figures | None:
        """One step; then the log and the state, where they are due. Returns what the log says, for the progress.

        Raises InputError where a loss is not finite.
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
        self._learn(step, interrupt)
        if self.together:
            for parameter in self.names:
                if parameter.grad is not None:
                    parameter.grad = self._sum_over_processes(parameter.grad)
        self.optimiser.step(step)

    def _choose_k(self, step: int) -> None:
        for layer in self.layers.values():
            if layer.n_experts:
                layer.k = active_experts(step, self.steps, self.recipe.train.k_init or self.recipe.layer.k, self.recipe.layer.k)

    def _agree(self, counted: Tensor, interrupt: Interrupt) -> Tensor:
        """The tokens that count in all processes. With the same message they agree on saving after this step, and on stopping then."""
        saving = self.writes and self._save_is_due()
        if not self.together:
            self.saving, self.stopping = saving, interrupt.told
            return counted
        flags = (torch.tensor(int(flag), device=self.device) for flag in (saving, interrupt.told))
        total, save, stop = self._sum_over_processes(torch.stack([counted, *flags]))
        self.saving, self.stopping = bool(save), bool(stop)
        return total.clamp_min(1)

    def _sum_over_processes(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, "sum") if self.together else tensor

    # --- log and state ---------------------------------------------------------------------------------------------------------

    def _log(self, rate: float) -> tuple[float, float]:
        """Writes a line and clears the windows. Returns mean FVU and dead share. Raises InputError where a loss is not finite."""
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
            **self._more(),
            "layers": figures,
        }
        if self.writes:
            append_line(self.log_path, line)
        fvu, dead = (sum(layer[key] for layer in figures.values()) / len(figures) for key in ("fvu", "dead_fraction"))
        track(self.accelerator, line, self.this.layers)
        return fvu, dead

    def _shares(self, seconds: float) -> dict[str, float]:
        """Shares of the time since the start: in the base's forward, in reading text, and in the layers' steps, which is the rest."""
        shares = {name: spent / max(seconds, 1e-9) for name, spent in self.activations.seconds.items()}
        return {"base": shares["base"], "layers": max(0.0, 1.0 - sum(shares.values())), "data": shares["data"]}

    def _not_finite(self, index: int) -> NotFinite:
        losses = self.losses[index]
        finite = [bool(loss.isfinite()) for loss in losses]
        step = self.done - len(losses) + (finite.index(False) if False in finite else len(losses) - 1) + 1
        good = [int(path.stem.removeprefix("step-")) for path in self.folder.glob("step-*.json")]
        kept = f"; the last good state is that of step {self.first_step + max(good)}" if good else ""
        advice = self._advice()
        if not self.windows[index].output_squares.isfinite():  # no step's size has to do with it
            advice = f"What the base model's MLP returns is not finite: set base.dtype ({self.recipe.base.dtype}) to bfloat16 or float32"
        error = NotFinite(
            f"layer {index}: the loss is not finite at step {self.first_step + step}{kept}. {advice}, and start over with --fresh"
        )
        error.told = not self.writes  # all processes that share out a batch find it
        return error

    def _save_is_due(self) -> bool:
        """A minute after the last save, or later where saving would take more than a twentieth of the time."""
        return time.monotonic() - self.saved_at > max(SAVE_SECONDS, 20 * self.save_seconds)

    def save(self) -> None:
        """Writes the state, from which a later call goes on. Raises InputError where a parameter is not finite."""
        start = time.monotonic()
        for index, layer in self.layers.items():  # what is kept must be good to go on from
            if not all(parameter.isfinite().all() for parameter in layer.parameters()):
                raise self._not_finite(index)
        windows = {
            f"{index}/window/{name}": self._sum_over_processes(tensor.double()).to(tensor.dtype)
            for index, window in self.windows.items()
            for name, tensor in window.tensors().items()
        }
        if self.writes:
            tensors: dict[str, Tensor] = {name: parameter.detach() for parameter, name in self.names.items()}
            if self.done < self.steps:  # finished layers need no more than themselves
                tensors |= self.optimiser.tensors(self.names) | windows
            facts = {
                "steps": self.steps,
                "seconds": self.seconds,
                "resumed_at_steps": self.resumed_at,
                "unsent": self.unsent + ([] if self.accelerator.is_main_process else [[self.began, self.done]]),
                "layers": list(self.layers),
                **self._facts(),
            }
            save_state(self.folder, self.done, tensors, facts, self.recipe.fingerprint())
        if self.together:
            self.accelerator.wait_for_everyone()
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - start

    def _restore(self) -> None:
        found = load_state(self.folder, self.recipe.fingerprint())
        if found is None or found[2]["layers"] != list(self.layers):
            if self.writes:
                self._drop_damaged(-1, "training starts over")
                self.log_path.unlink(missing_ok=True)
            self._begin()
            return
        self.done, tensors, facts = found
        if self.writes:
            self._drop_damaged(self.done, f"the one of step {self.done:,} is used")
            cut_log(self.log_path, facts["log"])
        self._take(facts)
        with torch.no_grad():
            for parameter, name in self.names.items():
                parameter.copy_(tensors[name])
            if self.done == self.steps:
                return
            for index, window in self.windows.items() if self.writes else ():  # the sums of all processes
                for name, tensor in window.tensors().items():
                    tensor.copy_(tensors[f"{index}/window/{name}"])
            self.optimiser.restore(self.names, tensors)
        self.seconds = facts["seconds"]
        self.resumed_at, self.began = [*facts["resumed_at_steps"], self.done], self.done
        self.unsent = facts.get("unsent", [])

    def _drop_damaged(self, step: int, then: str) -> None:
        """Remove the states after `step`, none of which is whole, and say so."""
        if (damaged := drop_damaged(self.folder, step)) and not self.quiet:
            print(f"{damaged[-1]}: this saved state or its log is damaged; {then}", file=sys.stderr, flush=True)
