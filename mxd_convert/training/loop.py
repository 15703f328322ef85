"""Training of all layers: in one pass where they fit, in groups where they don't, one after the other in sequential order."""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mxd_convert.architectures import Site
from mxd_convert.data import Blocks
from mxd_convert.errors import InputError
from mxd_convert.layers import MxD
from mxd_convert.recipe import Recipe
from mxd_convert.training.activations import Source, buffer_steps
from mxd_convert.training.allocator import kept_memory
from mxd_convert.training.interrupt import Interrupt
from mxd_convert.training.log import NAME, merge_logs
from mxd_convert.training.presets import steps_of
from mxd_convert.training.stage import Stage, make_layer
from mxd_convert.training.state import finished_states


@dataclass
class Trained:
    """The layers by index, on the CPU in float32, and what their training cost. Steps and tokens are those of each layer."""

    layers: dict[int, MxD]
    steps: int
    tokens: int
    seconds: float
    resumed_at_steps: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """What is to be trained on what.

    recipe: with its `train` keys resolved. experts: N by layer index. share: of the layers, which this process trains and which
    every process trains, by process. grouped: splits layers into those trained in one pass. folder: for log and state.
    """

    recipe: Recipe
    base: nn.Module
    sites: list[Site]
    experts: dict[int, int]
    blocks: Blocks
    folder: Path
    accelerator: Accelerator
    shares: list[list[int]]
    grouped: Callable[[list[int]], list[list[int]]]
    quiet: bool = False


def train_layers(job: Job) -> Trained:
    """Trains a layer for every site on the activations of the base; goes on from the states in the job's folder if there are some.

    Writes `training_log.jsonl` and `state/` there. Raises InputError for a loss that is not finite, for a full disk and where memory
    runs out, KeyboardInterrupt (after saving) when interrupted.
    """
    with kept_memory():
        return _Training(job).run()


class _Training:
    def __init__(self, job: Job) -> None:
        self.job, self.recipe, self.accelerator = job, job.recipe, job.accelerator
        train, context = job.recipe.train, job.blocks.context
        assert train.batch_tokens is not None
        self.together = self.accelerator.num_processes > 1 and train.distribute == "data"
        self.rows_a_step = train.batch_tokens // context
        if self.together and self.rows_a_step < self.accelerator.num_processes:
            raise InputError(
                f"train.batch_tokens: {train.batch_tokens} tokens are {self.rows_a_step} blocks of {context}, fewer than the"
                f" {self.accelerator.num_processes} processes; raise train.batch_tokens"
            )
        self.steps = steps_of(job.recipe.data.tokens, train.batch_tokens, context)
        self.tokens = self.steps * self.rows_a_step * context
        self.sites = {site.index: site for site in job.sites}
        self.states = job.folder / "state"
        if not hasattr(job.base, "hf_device_map"):
            job.base.to(self.accelerator.device)

    def run(self) -> Trained:
        finished = self._finished()
        share = self.job.shares[self.accelerator.process_index]
        left = self.job.grouped([index for index in share if index not in finished])
        with Interrupt() as interrupt:
            for number, group in enumerate(left):
                self._train_group(group, number, len(left), finished, interrupt)
        if not self.together and self.accelerator.num_processes > 1:
            if not self.job.quiet:
                print("waiting for the other processes' layers", file=sys.stderr, flush=True)
            self.accelerator.wait_for_everyone()
        return self._collect()

    def _train_group(self, group: list[int], number: int, groups: int, finished: dict[int, MxD], interrupt: Interrupt) -> None:
        train = self.recipe.train
        sequential = train.order == "sequential"
        name = f" of layer{'s' if len(group) > 1 else ''} {_span(group)}" if groups > 1 else ""
        source = Source(
            base=self.job.base,
            sites=[self.sites[index] for index in group],
            blocks=self.job.blocks,
            rows_a_step=self.rows_a_step,
            steps=self.steps,
            buffer_steps=buffer_steps(self.rows_a_step * self.job.blocks.context, self.job.sites),
            seed=train.seed,
            mask_bos=train.mask_bos,
            below=self._below(finished) if sequential else {},
            teacher=sequential and train.target == "teacher",
            process=(self.accelerator.process_index, self.accelerator.num_processes) if self.together else (0, 1),
        )
        stage = Stage(
            self.recipe,
            source,
            self.job.experts,
            self.states / f"layers-{_span(group)}",
            self.accelerator,
            self.together,
            self.job.quiet,
            name,
            before=number * self.tokens,
            total=groups * self.tokens,
        )
        stage.train(interrupt)
        if sequential:
            finished |= stage.layers

    def _below(self, finished: dict[int, MxD]) -> dict[str, nn.Module]:
        """The layers already converted as the checkpoint will have them: in the base's precision, on its device."""
        dtype = next(self.job.base.parameters()).dtype
        layers = {
            self.sites[index].path: copy.deepcopy(layer).to(self.accelerator.device, dtype).requires_grad_(False)
            for index, layer in finished.items()
        }
        spread = hasattr(self.job.base, "hf_device_map")  # then the layer before may be elsewhere
        return {path: _Elsewhere(layer, self.accelerator.device) if spread else layer for path, layer in layers.items()}

    def _finished(self) -> dict[int, MxD]:
        """The layers that an earlier call of this run has trained to the end, whatever groups it had."""
        layers = {}
        for _, tensors, facts in finished_states(self.states, self.recipe.fingerprint()):
            for index in facts["layers"]:
                layers[index] = make_layer(self.recipe, self.sites[index], self.job.experts[index])
                layers[index].load_state_dict(
                    {name.removeprefix(f"{index}/"): tensors[name] for name in tensors if name.startswith(f"{index}/")}
                )
        return layers

    def _collect(self) -> Trained:
        """What all processes have trained, out of their last states; writes the run's log."""
        layers = self._finished()
        assert sorted(layers) == sorted(self.sites)
        states = [(folder, facts) for folder, _, facts in finished_states(self.states, self.recipe.fingerprint())]
        by_process = [[state for state in states if state[1]["layers"][0] in share] for share in self.job.shares]
        if self.together:
            by_process = by_process[:1]
        if self.accelerator.is_main_process:
            merge_logs([[folder / NAME for folder, _ in mine] for mine in by_process], self.job.folder / NAME)
        seconds = max(sum(facts["seconds"] for _, facts in mine) for mine in by_process)
        resumed = sorted({step for _, facts in states for step in facts["resumed_at_steps"]})
        ordered = {index: layers[index].cpu() for index in sorted(layers)}
        return Trained(ordered, self.steps, self.tokens, seconds, resumed)


class _Elsewhere(nn.Module):
    """A layer on a device of its own in a model that is spread over several."""

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.layer, self.device = layer, device

    def forward(self, x_BTI: Tensor) -> Tensor:
        return self.layer(x_BTI.to(self.device)).to(x_BTI.device)


def _span(group: list[int]) -> str:
    return f"{group[0]}-{group[-1]}" if len(group) > 1 else str(group[0])
