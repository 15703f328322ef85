"""What training adds to the layers of a checkpoint: initialisation, losses, matched expert counts. Knows neither files nor models."""

from mxd_convert.layers.losses import normalised_mse
from mxd_convert.layers.spec import LayerSpec
from mxd_convert.layers.trainable import MxD, Trainable, new_layer

__all__ = ["LayerSpec", "MxD", "Trainable", "new_layer", "normalised_mse"]
