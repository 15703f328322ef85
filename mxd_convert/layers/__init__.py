"""Trainable layers: initialisation, training losses and matched expert counts. Independent of files and of base models."""

from mxd_convert.layers.losses import normalised_mse
from mxd_convert.layers.spec import LayerSpec
from mxd_convert.layers.trainable import MxD, Trainable, new_layer

__all__ = ["LayerSpec", "MxD", "Trainable", "new_layer", "normalised_mse"]
