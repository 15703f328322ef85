"""Steering: change an expert's coefficient while the model runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mxd_convert.errors import InputError


@contextmanager
def steer(model: Any, layer: int, expert: int, add: float) -> Iterator[None]:
    """Within it, `add` is added to the coefficient of one expert of a converted model at every position, active or not.

    Contexts nest and add up. Raises InputError where the model has no such layer or expert.
    """
    layers = model.mxd_layers()
    if layer not in layers:
        raise InputError(f"layer {layer} is not converted; converted are {', '.join(map(str, layers))}")
    module = layers[layer]
    if not 0 <= expert < module.n_experts:
        raise InputError(f"layer {layer} has experts 0 to {module.n_experts - 1}; there is no expert {expert}")
    before = dict(module.steering)
    module.steering = {**before, expert: before.get(expert, 0.0) + float(add)}
    try:
        yield
    finally:
        module.steering = before
