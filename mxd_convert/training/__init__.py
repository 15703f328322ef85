"""Training of the layers on harvested activations: passes over groups of layers, optimiser and schedule, saved state, many processes."""

from mxd_convert.training.loop import Job, Trained, train_layers
from mxd_convert.training.presets import resolve_hidden, resolve_train
from mxd_convert.training.together import same_activations, train_together
from mxd_convert.training.tracking import finish_tracker, start_tracker

__all__ = [
    "Job",
    "Trained",
    "finish_tracker",
    "resolve_hidden",
    "resolve_train",
    "same_activations",
    "start_tracker",
    "train_layers",
    "train_together",
]
