"""Interruptions of training at a chosen step, as Ctrl-C causes them."""

import pytest

from mxd_convert import convert
from mxd_convert.training.stage import Stage


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, kind: type[Stage] = Stage) -> None:
    """Request an interruption while a stage of exactly this kind takes the step."""
    take = Stage._step

    def interrupted(self, number, interrupt):
        interrupt.requested = type(self) is kind and number == step
        take(self, number, interrupt)

    monkeypatch.setattr(Stage, "_step", interrupted)


def interrupted_run(recipe: dict, step: int, kind: type[Stage] = Stage, **options) -> None:
    """Run a recipe and interrupt it at a step. options: those of `convert`."""
    with pytest.MonkeyPatch.context() as patched:
        interrupt_at(patched, step, kind)
        with pytest.raises(KeyboardInterrupt):
            convert(recipe, quiet=True, **options)
