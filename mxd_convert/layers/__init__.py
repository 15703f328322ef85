"""What training adds to the MxD of a checkpoint: initialisation, losses, matched expert counts. Knows neither files nor HuggingFace models."""

from mxd_convert.layers.counts import matched_experts, mxd_forward_flops, mxd_parameters, mxd_step_flops, transcoder_parameters
from mxd_convert.layers.losses import normalised_mse
from mxd_convert.layers.mxd import MxD

__all__ = [
    "MxD",
    "matched_experts",
    "mxd_forward_flops",
    "mxd_parameters",
    "mxd_step_flops",
    "normalised_mse",
    "transcoder_parameters",
]
