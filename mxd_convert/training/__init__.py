"""Training of the layers on harvested activations: passes over groups of layers, optimiser and schedule, saved state, many processes."""

from mxd_convert.training.loop import Job, Trained, train_layers
from mxd_convert.training.presets import resolve_train

__all__ = ["Job", "Trained", "resolve_train", "train_layers"]
