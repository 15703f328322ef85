"""Training of all layers: in one pass if they fit in memory, else in groups; one after the other in sequential order."""

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

JOINT = "joint"  # folder of the joint stage's state, next to those of the groups


@dataclass
class Trained:
    """Trained layers and the cost of their training.

    Attributes:
        layers: by index, on the CPU in float32.
        steps: of each layer, with those of the joint stage.
        tokens: that each layer was trained on.
        seconds: of training, without interruptions.
        resumed_at_steps: the steps at which the run was resumed.
        twin: the dense twin's.
    """

    layers: dict[int, Trainable]
    steps: int
    tokens: int
    seconds: float
    resumed_at_steps: list[int] = field(default_factory=list)
    twin: "Trained | None" = None


@dataclass(frozen=True)
class Job:
    """The layers to train, their data and their devices.

    Attributes:
        recipe: with its `train` keys resolved.
        shapes: of the layers, by index.
        folder: for log and state.
        shares: indices of the layers that each process trains, by rank.
        grouped: splits layer indices into groups that are trained in one pass.
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
    """Train a layer for each site on the activations of the base. Resumes from the states in the job's folder, if any.

    Writes `training_log.jsonl` and `state/` there.

    Returns:
        The layers of all processes in the main process, None in the others.

    Raises:
        InputError: if a loss is not finite, the disk is full or memory runs out.
        KeyboardInterrupt: when interrupted, after saving.
    """
    with kept_memory(), memory_guard(memory_advice(job.recipe)):
        return Training(job).run()


def memory_advice(recipe: Recipe) -> str:
    """Return the message for a run that is out of memory: which settings to lower."""
    train, layer = recipe.train, recipe.layer
    moments = ", set train.moments: bf16" if train.moments == "fp32" else ""
    if train.joint:  # all layers at once: a lower train.memory_gib would only be refused
        fewer = (
            f" or set train.joint: 0 ({train.joint:g}), and start over with --fresh. With more memory the same command resumes."
        )
    else:
        fewer = (
            " or set train.memory_gib below the memory that was available, to train fewer layers at once. The run resumes from its last"
            " saved state."
        )
    return (
        f"out of memory while training. Lower train.batch_tokens ({train.batch_tokens}) or {layer.size_key} ({layer.size}){moments},"
        f"{fewer}"
    )


def move_to_device(job: Job) -> None:
    """Move the base model to the job's device, unless accelerate has spread it over several."""
    if not hasattr(job.base, "hf_device_map"):
        job.base.to(job.accelerator.device)


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
        self.below: dict[str, nn.Module] = {}  # the layers trained so far in sequential order, by path

    def run(self) -> Trained | None:
        """Train all groups, then all layers jointly if the recipe says so. Returns the layers in the main process, else None."""
        move_to_device(self.job)
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
            print(f"{before} of {before + len(groups)} passes are already done", file=sys.stderr, flush=True)
        with Interrupt() as interrupt:
            for number, group in enumerate(groups, before + 1):
                self._train_group(group, number, before + len(groups), interrupt)
                if self._interrupted(interrupt, self.together):  # during the last step, which has been saved
                    raise KeyboardInterrupt
            if not self.together and self.accelerator.num_processes > 1:
                if not self.job.quiet:
                    print("waiting for the other processes", file=sys.stderr, flush=True)
                self.accelerator.wait_for_everyone()
                if interrupt.requested and not self.joint_steps:
                    raise KeyboardInterrupt
            if self.joint_steps:
                self._train_jointly(interrupt)
        return self._collect() if self.accelerator.is_main_process else None

    def _interrupted(self, interrupt: Interrupt, together: bool) -> bool:
        """Return whether this process was interrupted, or, if `together`, any process of the run."""
        if not together:
            return interrupt.requested
        flag = torch.tensor(int(interrupt.requested), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum"))

    def _earlier(self) -> tuple[list[list[int]], list[list[int]]]:
        """Return the groups that earlier calls of this run have finished, and those that they have begun but not finished."""
        finished: list[list[int]] = []
        begun: list[list[int]] = []
        for folder, note in groups_with_state(self.states, self.recipe.fingerprint()):
            whole = load_state(folder, self.recipe.fingerprint())  # a good note may have damaged tensors
            if whole is not None:
                (finished if whole[0] == note["steps"] else begun).append(note["layers"])
        return finished, begun

    def _split_begun(self) -> None:
        """Split unfinished groups that no longer fit in memory or now belong to several processes. Each subgroup resumes."""
        remove_leftovers(self.states)
        begun = self._earlier()[1]
        for group in begun:
            if any(set(group) < set(other) for other in begun):  # left by an interrupted split, which is repeated
                remove_state(self._folder(group))
                continue
            shares = [self.job.shares[0]] if self.together else self.job.shares
            subgroups = [found for share in shares for found in self.job.grouped([index for index in group if index in share])]
            if subgroups != [group]:
                folders = {self._folder(subgroup): subgroup for subgroup in subgroups}
                split_state(self._folder(group), folders, self.recipe.fingerprint())

    def _folder(self, group: list[int]) -> Path:
        return self.states / f"layers-{_span(group)}"

    def _train_group(self, group: list[int], number: int, passes: int, interrupt: Interrupt) -> None:
        stage = self.stage(group, number, passes)
        stage.train(interrupt)
        if self.recipe.train.order == "sequential":
            self._put_below(stage.layers)

    def _train_jointly(self, interrupt: Interrupt) -> None:
        """Run the joint stage. Each process takes its share of every batch, for any `train.distribute`."""
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
        if self._interrupted(interrupt, self.accelerator.num_processes > 1):
            raise KeyboardInterrupt

    @property
    def _process(self) -> tuple[int, int]:
        """Return rank and number of processes."""
        return self.accelerator.process_index, self.accelerator.num_processes

    def stage(self, group: list[int], number: int = 1, passes: int = 1, activations: Activations | None = None) -> Stage:
        """Return a new pass over the text for a group of layers. activations: of another run that reads the same batches."""
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
            mask=train.mask,
            below=self.below,
            teacher=train.target == "teacher",
            process=self._process if self.together else (0, 1),
        )

    def _named(self, group: list[int]) -> str:
        """Return the name of a group for progress and trackers; empty if it has all layers."""
        return "" if len(group) == len(self.sites) else f"layer{'s' if len(group) > 1 else ''} {_span(group)}"

    def _put_below(self, layers: dict[int, Trainable]) -> None:
        """Put trained layers below those that follow, in the base's precision like in the checkpoint.

        The layers are cast in place: their state is saved already.
        """
        dtype, device = next(self.job.base.parameters()).dtype, self.accelerator.device
        spread = hasattr(self.job.base, "hf_device_map")  # inputs may then be on another device
        for index, layer in layers.items():
            layer.to(device, dtype).requires_grad_(False)
            self.below |= self.sites[index].replacements(_OnDevice(layer, device) if spread else layer)

    def _load(self, group: list[int]) -> dict[int, Trainable]:
        """Return the layers of a finished group, from its last state."""
        found = load_state(self._folder(group), self.recipe.fingerprint())
        assert found is not None
        layers = {}
        for index in group:
            layers[index] = make_layer(self.job.shapes[index], self.recipe.train.seed, index, self.recipe.train.init)
            layers[index].load_state_dict(_of_layer(found[1], index))
        return layers

    def _collect(self) -> Trained:
        """Return the layers of all processes and write the log of the run."""
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


class _OnDevice(nn.Module):
    """A layer on one device, in a model that is spread over several. Inputs and outputs are moved."""

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.layer, self.device = layer, device

    def forward(self, x_BTI: Tensor) -> Tensor:
        return self.layer(x_BTI.to(self.device)).to(x_BTI.device)


def _of_layer(tensors: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """Return the parameters of one layer from the tensors of a finished state, by their names in the layer."""
    return {name.removeprefix(f"{index}/"): tensors[name] for name in tensors if name.startswith(f"{index}/")}


def _span(group: list[int]) -> str:
    """Return `0-4` for consecutive layers, else all indices, `0,2,5`: names a group and its folder."""
    neighbours = len(group) > 1 and group[-1] - group[0] == len(group) - 1
    return f"{group[0]}-{group[-1]}" if neighbours else ",".join(map(str, group))
