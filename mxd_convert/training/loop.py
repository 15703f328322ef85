"""Training of all layers: in one pass where they fit, in groups where they don't, one after the other in sequential order."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mxd_convert.base_model.families import Site
from mxd_convert.data.blocks import Blocks
from mxd_convert.errors import memory_guard
from mxd_convert.layers import LayerSpec, Trainable
from mxd_convert.recipe.presets import joint_steps, steps_of
from mxd_convert.recipe.schema import Recipe
from mxd_convert.training.allocator import kept_memory
from mxd_convert.training.interrupt import Interrupt
from mxd_convert.training.joint import JointStage
from mxd_convert.training.log import NAME, lines_of, merge_logs
from mxd_convert.training.stage import Pass, Stage, make_layer
from mxd_convert.training.state import groups_with_state, load_state, remove_leftovers, remove_state, split_state
from mxd_convert.training.stream import Activations, Source, buffer_steps
from mxd_convert.training.tracking import track

JOINT = "joint"  # folder of its state, beside those of the groups


@dataclass
class Trained:
    """The layers by index, on the CPU in float32, and what their training cost. Steps and tokens are those of each layer. twin: the dense one."""

    layers: dict[int, Trainable]
    steps: int
    tokens: int
    seconds: float
    resumed_at_steps: list[int] = field(default_factory=list)
    twin: "Trained | None" = None


@dataclass(frozen=True)
class Job:
    """What is to be trained on what.

    recipe: with its `train` keys resolved. shapes: of the layers, by index. shares: the layers that each process trains, by process.
    grouped: splits layers into those trained in one pass. folder: for log and state.
    """

    recipe: Recipe
    base: nn.Module
    sites: list[Site]
    shapes: dict[int, LayerSpec]
    blocks: Blocks
    folder: Path
    accelerator: Accelerator
    shares: list[list[int]]
    grouped: Callable[[list[int]], list[list[int]]]
    quiet: bool = False


def train_layers(job: Job) -> Trained | None:
    """Trains a layer for every site on the activations of the base; goes on from the states in the job's folder if there are some.

    Writes `training_log.jsonl` and `state/` there. The main process gets the layers of all processes, the others None. Raises
    InputError for a loss that is not finite, for a full disk and where memory runs out, KeyboardInterrupt (after saving) when
    interrupted.
    """
    with kept_memory(), memory_guard(lower(job.recipe)):
        return Training(job).run()


def lower(recipe: Recipe) -> str:
    """What to say where memory runs out."""
    train, layer = recipe.train, recipe.layer
    moments = ", set train.moments: bf16" if train.moments == "fp32" else ""
    if train.joint:  # it takes all layers at once: train.memory_gib would only have it refused
        fewer = f" or train.joint: 0 ({train.joint:g}), and start over with --fresh. With more memory the same command goes on."
    else:
        fewer = (
            " or set train.memory_gib to less than there was, so that fewer layers are trained at once. The run goes on from its last"
            " saved state."
        )
    return (
        f"out of memory while training; lower train.batch_tokens ({train.batch_tokens}) or {layer.size_key} ({layer.size}){moments},"
        f"{fewer}"
    )


class Training:
    """The training of one job."""

    def __init__(self, job: Job) -> None:
        self.job, self.recipe, self.accelerator = job, job.recipe, job.accelerator
        train, context = job.recipe.train, job.blocks.context
        assert train.batch_tokens is not None
        self.together = self.accelerator.num_processes > 1 and train.distribute == "data"
        self.rows_a_step = train.batch_tokens // context
        steps = steps_of(job.recipe.data.tokens, train.batch_tokens, context)
        self.joint_steps = joint_steps(steps, train.joint)
        self.steps = steps - self.joint_steps  # of every layer alone
        self.tokens = steps * self.rows_a_step * context
        self.sites = {site.index: site for site in job.sites}
        self.states = job.folder / "state"
        self.below: dict[str, nn.Module] = {}  # in sequential order, the layers trained so far, by path
        if not hasattr(job.base, "hf_device_map"):
            job.base.to(self.accelerator.device)

    def run(self) -> Trained | None:
        share = self.job.shares[self.accelerator.process_index]
        if self.accelerator.is_main_process:
            self._split_begun()
        self.accelerator.wait_for_everyone()
        finished, begun = self._earlier()
        if self.recipe.train.order == "sequential":
            for group in finished:
                self._put_below(self._load(group))
        kept = [group for group in begun if set(group) <= set(share)]
        held = {index for group in finished + kept for index in group}
        groups = sorted(kept + self.job.grouped([index for index in share if index not in held]))
        before = sum(1 for group in finished if group[0] in share)
        if before and not self.job.quiet:
            print(f"{before} of {before + len(groups)} passes are done already", file=sys.stderr, flush=True)
        with Interrupt() as interrupt:
            for number, group in enumerate(groups, before + 1):
                self._train_group(group, number, before + len(groups), interrupt)
                if self._is_told(interrupt, self.together):  # during the last step, which has been saved
                    raise KeyboardInterrupt
            if not self.together and self.accelerator.num_processes > 1:
                if not self.job.quiet:
                    print("waiting for the other processes' layers", file=sys.stderr, flush=True)
                self.accelerator.wait_for_everyone()
                if interrupt.told and not self.joint_steps:
                    raise KeyboardInterrupt
            if self.joint_steps:
                self._train_jointly(interrupt)
        return self._collect() if self.accelerator.is_main_process else None

    def _is_told(self, interrupt: Interrupt, together: bool) -> bool:
        """Whether to stop: this process, or any that share out the batches with it."""
        if not together:
            return interrupt.told
        told = torch.tensor(int(interrupt.told), device=self.accelerator.device)
        return bool(self.accelerator.reduce(told, "sum"))

    def _earlier(self) -> tuple[list[list[int]], list[list[int]]]:
        """The groups that an earlier call of this run has finished, and those that it was in the middle of."""
        finished: list[list[int]] = []
        begun: list[list[int]] = []
        for folder, note in groups_with_state(self.states, self.recipe.fingerprint()):
            whole = load_state(folder, self.recipe.fingerprint())  # only its tensors show that it is not damaged
            if whole is not None:
                (finished if whole[0] == note["steps"] else begun).append(note["layers"])
        return finished, begun

    def _split_begun(self) -> None:
        """Splits the groups that were cut off where they no longer fit, or belong to several processes now: each part goes on."""
        remove_leftovers(self.states)
        begun = self._earlier()[1]
        for group in begun:
            if any(set(group) < set(other) for other in begun):  # of a split that was cut off: it is done again
                remove_state(self._folder(group))
                continue
            shares = [self.job.shares[0]] if self.together else self.job.shares
            parts = [part for share in shares for part in self.job.grouped([index for index in group if index in share])]
            if parts != [group]:
                folders = {self._folder(part): part for part in parts}
                split_state(self._folder(group), folders, self.recipe.fingerprint())

    def _folder(self, group: list[int]) -> Path:
        return self.states / f"layers-{_span(group)}"

    def _train_group(self, group: list[int], number: int, passes: int, interrupt: Interrupt) -> None:
        stage = self.stage(group, number, passes)
        stage.train(interrupt)
        if self.recipe.train.order == "sequential":
            self._put_below(stage.layers)

    def _train_jointly(self, interrupt: Interrupt) -> None:
        """All layers together, each process with its part of every batch, however the layers were shared out."""
        finished, _ = self._earlier()
        self.below = {}
        stage = JointStage(
            self.recipe,
            replace(self._source(list(self.sites), self.joint_steps), process=self._process),
            self.job.shapes,
            self.states / JOINT,
            self.accelerator,
            self.job.quiet,
            {index: layer for group in finished for index, layer in self._load(group).items()},
            self.steps,
        )
        stage.train(interrupt)
        if self._is_told(interrupt, self.accelerator.num_processes > 1):
            raise KeyboardInterrupt

    @property
    def _process(self) -> tuple[int, int]:
        return self.accelerator.process_index, self.accelerator.num_processes

    def stage(self, group: list[int], number: int = 1, passes: int = 1, activations: Activations | None = None) -> Stage:
        """A pass over the text for a group of layers. activations: of another run that reads the same."""
        return Stage(
            self.recipe,
            self._source(group, self.steps),
            self.job.shapes,
            self._folder(group),
            self.accelerator,
            self.together,
            self.job.quiet,
            Pass(self._named(group), number, passes),
            activations,
        )

    def _source(self, group: list[int], steps: int) -> Source:
        train = self.recipe.train
        return Source(
            base=self.job.base,
            sites=[self.sites[index] for index in group],
            blocks=self.job.blocks,
            rows_a_step=self.rows_a_step,
            steps=steps,
            buffer_steps=buffer_steps(self.rows_a_step * self.job.blocks.context, self.job.sites),
            seed=train.seed,
            mask_bos=train.mask_bos,
            below=self.below,
            teacher=train.target == "teacher",
            process=self._process if self.together else (0, 1),
        )

    def _named(self, group: list[int]) -> str:
        """For the progress and the trackers: empty where the group is all that is trained."""
        return "" if len(group) == len(self.sites) else f"layer{'s' if len(group) > 1 else ''} {_span(group)}"

    def _put_below(self, layers: dict[int, Trainable]) -> None:
        """Layers already converted as the checkpoint will have them: in the base's precision; in place, since their state is saved."""
        dtype, device = next(self.job.base.parameters()).dtype, self.accelerator.device
        spread = hasattr(self.job.base, "hf_device_map")  # then the layer before may be elsewhere
        for index, layer in layers.items():
            layer.to(device, dtype).requires_grad_(False)
            self.below |= self.sites[index].stand_in(_Elsewhere(layer, device) if spread else layer)

    def _load(self, group: list[int]) -> dict[int, Trainable]:
        """The layers of a finished group, out of its last state."""
        found = load_state(self._folder(group), self.recipe.fingerprint())
        assert found is not None
        layers = {}
        for index in group:
            layers[index] = make_layer(self.job.shapes[index], self.recipe.train.seed, index, self.recipe.train.init)
            layers[index].load_state_dict(_of_layer(found[1], index))
        return layers

    def _collect(self) -> Trained:
        """What all processes have trained; writes the run's log."""
        finished, _ = self._earlier()
        layers = {index: layer for group in finished for index, layer in self._load(group).items()}
        assert sorted(layers) == sorted(self.sites)
        states = list(groups_with_state(self.states, self.recipe.fingerprint()))
        states = [(folder, facts) for folder, facts in states if facts["layers"] in finished]
        shares = self.job.shares[:1] if self.together else self.job.shares
        by_process = [[state for state in states if state[1]["layers"][0] in share] for share in shares]
        for folder, facts in states:
            for line in lines_of(folder / NAME):
                if any(first < line["step"] <= last for first, last in facts.get("unsent", [])):
                    track(self.accelerator, line, self._named(facts["layers"]))
        seconds = max(sum(facts["seconds"] for _, facts in mine) for mine in by_process)
        resumed = {step for _, facts in states for step in facts["resumed_at_steps"]}
        if self.joint_steps:
            found = load_state(self.states / JOINT, self.recipe.fingerprint())
            assert found is not None
            _, tensors, facts = found
            for index, layer in layers.items():
                layer.load_state_dict(_of_layer(tensors, index))
            seconds += facts["seconds"]
            resumed |= {self.steps + step for step in facts["resumed_at_steps"]}
        logs = [[folder / NAME for folder, _ in mine] for mine in by_process]
        merge_logs(logs, self.job.folder / NAME, lines_of(self.states / JOINT / NAME) if self.joint_steps else ())
        steps = self.steps + self.joint_steps
        return Trained({index: layers[index] for index in sorted(layers)}, steps, self.tokens, seconds, sorted(resumed))


class _Elsewhere(nn.Module):
    """A layer on a device of its own in a model that is spread over several."""

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.layer, self.device = layer, device

    def forward(self, x_BTI: Tensor) -> Tensor:
        return self.layer(x_BTI.to(self.device)).to(x_BTI.device)


def _of_layer(tensors: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """A layer's own parameters out of a finished state."""
    return {name.removeprefix(f"{index}/"): tensors[name] for name in tensors if name.startswith(f"{index}/")}


def _span(group: list[int]) -> str:
    """`0-4` for neighbours, else every index: the name of a group's folder."""
    neighbours = len(group) > 1 and group[-1] - group[0] == len(group) - 1
    return f"{group[0]}-{group[-1]}" if neighbours else ",".join(map(str, group))
