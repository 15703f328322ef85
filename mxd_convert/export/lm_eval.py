"""Steering in the format of lm-eval's model type `steered`."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mxd_convert.errors import InputError
from mxd_convert.evaluation.steering import checked_orders
from mxd_convert.export.sources import hookpoint


@torch.no_grad()
def export_steering(model: Any, orders: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return lm-eval's entries for steering that adds to coefficients at every position.

    Adding `s * c_n` to the gain adds s to the coefficient of expert n.

    Args:
        model: a converted model.
        orders: steering orders, as returned by `parse_steering`.

    Returns:
        Entries by module path, seen from the model without its head. Each is {"steering_vector": (O) float32,
        "steering_coefficient": 1.0, "action": "add", "bias": None, "head_index": None}.

    Raises:
        InputError: for orders other than "add" at all positions, for which lm-eval has no action.
    """
    layers, vectors = model.mxd_layers(), dict[int, Tensor]()
    for order in checked_orders(model, orders):
        if "add" not in order or order["positions"] != "all":
            raise InputError(
                f"steering of expert {order['expert']} of layer {order['layer']}: lm-eval can only add, at all positions."
                " For other steering, save a checkpoint with model.set_steering and evaluate it with lm-eval's model `hf`."
            )
        row_O = order["add"] * layers[order["layer"]].experts[order["expert"]].detach().float().cpu()
        vectors[order["layer"]] = vectors[order["layer"]] + row_O if order["layer"] in vectors else row_O
    return {
        f"{hookpoint(model, index)}.gain": {
            "steering_vector": vector_O,
            "steering_coefficient": 1.0,
            "action": "add",
            "bias": None,
            "head_index": None,
        }
        for index, vector_O in sorted(vectors.items())
    }
