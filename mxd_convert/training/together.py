"""Several runs that read the same activations, trained in one pass over the text: each batch is one step of all of them.

Results are the same as when trained alone: the initialisation depends on the seed and the layer, the batches on the seed and the
step. Each run has its own log and state, and is fully trained afterwards, ready to be assembled.
"""

import time
from collections.abc import Sequence

from mxd_convert.errors import InputError, NotFinite, memory_guard
from mxd_convert.recipe.schema import Recipe
from mxd_convert.training.allocator import kept_memory
from mxd_convert.training.interrupt import Interrupt
from mxd_convert.training.loop import Job, Training, memory_advice, move_to_device
from mxd_convert.training.progress import TrainingProgress
from mxd_convert.training.stage import Figures, Stage


def same_activations(recipe: Recipe) -> str:
    """Return a key that is equal for two runs if they read the same batches. recipe: resolved."""
    train = recipe.train
    keys = (train.batch_tokens, train.seed, train.mask, train.device, train.order, train.joint)
    return repr((recipe.base, recipe.data, recipe.layers, keys))


def train_together(jobs: Sequence[Job], quiet: bool = False) -> dict[int, InputError]:
    """Train jobs that read the same activations in one process, all layers of each in one pass. Resumes from their states.

    Returns the errors of jobs whose loss was not finite, by the job's number. Raises InputError if memory or disk runs out, and
    KeyboardInterrupt (after saving) when interrupted.
    """
    with kept_memory(), memory_guard(memory_advice(jobs[0].recipe)), Interrupt() as interrupt:
        return _Together(_stages(jobs), quiet).run(interrupt)


def _stages(jobs: Sequence[Job]) -> dict[int, Stage]:
    """Return the stage of each job by its number. All read the activations of the first."""
    stages: dict[int, Stage] = {}
    for number, job in enumerate(jobs):
        move_to_device(job)
        stages[number] = Training(job).stage(job.shares[0], activations=stages[0].activations if stages else None)
    return stages


class _Together:
    """The training of several stages that share their activations, by number."""

    def __init__(self, stages: dict[int, Stage], quiet: bool) -> None:
        self.stages, self.quiet = stages, quiet
        self.failed: dict[int, InputError] = {}
        self.steps, self.step_tokens = stages[0].steps, stages[0].step_tokens

    def run(self, interrupt: Interrupt) -> dict[int, InputError]:
        """Train all stages to their last step. Returns the errors of those that failed, by number."""
        never = Interrupt()  # stages don't see the signal, so that all of them save after the same step
        for stage in self.stages.values():
            stage.prepare()
        for stage in self.stages.values():
            stage.start_clock()
        start = min(stage.done for stage in self.stages.values())
        name = f"{len(self.stages)} runs"
        with TrainingProgress(name, self.steps * self.step_tokens, start * self.step_tokens, self.quiet) as progress:
            for step in range(start, self.steps):
                figures = self._round(step, never)
                if figures:
                    progress.figures(*_mean(figures))
                progress.update((step + 1) * self.step_tokens)
                if interrupt.requested:
                    for stage in self._working():
                        stage.save()
                    raise KeyboardInterrupt
        return self.failed

    def _working(self) -> list[Stage]:
        """Return the stages that have not failed."""
        return [stage for number, stage in self.stages.items() if number not in self.failed]

    def _round(self, step: int, never: Interrupt) -> list[Figures]:
        """Take one step of each run that has not taken it yet. Returns the figures of those at a log step."""
        due = {number: stage for number, stage in self.stages.items() if number not in self.failed and stage.done == step}
        began = time.monotonic()
        if due:
            next(iter(due.values())).activations.batch(step)
        shared = (time.monotonic() - began) / max(1, len(due))
        found = []
        for number, stage in due.items():
            # its time: its own steps and its share of the harvest
            stage.before, stage.start = stage.seconds + shared, time.monotonic()
            try:
                figures = stage.advance(never)
            except NotFinite as error:
                self.failed[number] = error
                continue
            if figures is not None:
                found.append(figures)
        return found


def _mean(figures: Sequence[Figures]) -> Figures:
    """Return mean FVU and mean dead share over the runs."""
    fvu, dead = (sum(values) / len(figures) for values in list(zip(*figures, strict=True))[:2])
    return fvu, dead, {}
