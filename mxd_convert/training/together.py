"""Several runs that read the same activations, trained in one pass over the text: each step is one batch for all of them.

What a run learns does not change: its start depends on the seed and the layer, its batches on the seed and the step. Each has a log and a state
of its own, as if it had been alone, and is at its end afterwards, ready to be assembled.
"""

import time
from collections.abc import Sequence

from mxd_convert.errors import InputError, NotFinite, memory_guard
from mxd_convert.recipe.schema import Recipe
from mxd_convert.training.allocator import kept_memory
from mxd_convert.training.interrupt import Interrupt
from mxd_convert.training.loop import Job, Training, lower
from mxd_convert.training.progress import TrainingProgress
from mxd_convert.training.stage import Figures, Stage


def same_activations(recipe: Recipe) -> str:
    """What two runs must have in common to read the same batches, of resolved recipes."""
    train = recipe.train
    keys = (train.batch_tokens, train.seed, train.mask_bos, train.device, train.order, train.joint)
    return repr((recipe.base, recipe.data, recipe.layers, keys))


def train_together(jobs: Sequence[Job], quiet: bool = False) -> dict[int, InputError]:
    """Trains jobs of one process that read the same activations, all layers of each in one pass. Goes on from their states.

    Returns what went wrong with those that could not be trained to the end (a loss that is not finite), by their number. Raises
    InputError where memory or disk runs out, KeyboardInterrupt (after saving) when interrupted.
    """
    with kept_memory(), memory_guard(lower(jobs[0].recipe)), Interrupt() as interrupt:
        return _Together(jobs, quiet).run(interrupt)


class _Together:
    def __init__(self, jobs: Sequence[Job], quiet: bool) -> None:
        self.failed: dict[int, InputError] = {}
        self.stages: dict[int, Stage] = {}
        self.quiet = quiet
        shared = None
        for number, job in enumerate(jobs):
            stage = Training(job).stage(job.shares[0], activations=shared)
            shared = stage.activations
            self.stages[number] = stage
        first = self.stages[0]
        self.steps, self.step_tokens = first.steps, first.step_tokens

    def run(self, interrupt: Interrupt) -> dict[int, InputError]:
        never = Interrupt()  # what a stage is told: all of them save after the same step, and not one in the middle of a round
        for stage in self.stages.values():
            stage.begin()
            stage.start = time.monotonic()
        start = min(stage.done for stage in self.stages.values())
        name = f"{len(self.stages)} runs"
        with TrainingProgress(name, self.steps * self.step_tokens, start * self.step_tokens, self.quiet) as progress:
            for step in range(start, self.steps):
                figures = self._round(step, never)
                if figures:
                    progress.figures(*_mean(figures))
                progress.update((step + 1) * self.step_tokens)
                if interrupt.told:
                    for stage in self._going():
                        stage.save()
                    raise KeyboardInterrupt
        return self.failed

    def _going(self) -> list[Stage]:
        return [stage for number, stage in self.stages.items() if number not in self.failed]

    def _round(self, step: int, never: Interrupt) -> list[Figures]:
        """One step of every run that has not taken it yet."""
        due = {number: stage for number, stage in self.stages.items() if number not in self.failed and stage.done == step}
        began = time.monotonic()
        if due:
            next(iter(due.values())).activations.batch(step)
        shared = (time.monotonic() - began) / max(1, len(due))
        found = []
        for number, stage in due.items():
            # its time is its own steps and its part of what all of them share
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
    fvu, dead = (sum(values) / len(figures) for values in list(zip(*figures, strict=True))[:2])
    return fvu, dead, {}
