"""What training adds to the layers of a checkpoint: initialisation, losses, matched expert counts. Knows neither files nor HuggingFace models."""

from mxd_convert.layers.losses import normalised_mse
from mxd_convert.layers.spec import Shape
from mxd_convert.layers.trainable import DenseTwin, MxD, Trainable, Transcoder, new_layer

__all__ = ["DenseTwin", "MxD", "Shape", "Trainable", "Transcoder", "new_layer", "normalised_mse"]
