# Copyright 2026 The mxd-convert authors. Apache-2.0.
"""Steering: the form of an order, and the orders of this thread. Needs nothing but Python."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any

STEERING = ("add", "set", "scale", "ablate")
POSITIONS = ("all", "prompt", "generation")


def read_steering(orders: Any, layers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Check steering orders against the layers' entries and return them with all defaults filled in.

    Raises ValueError, with a message of one line, if an order is invalid.
    """
    if not isinstance(orders, Sequence) or not all(isinstance(order, Mapping) for order in orders):
        raise ValueError(f"steering: {orders!r}: expected a list of mappings with layer, expert and one of {', '.join(STEERING)}")
    return [_read_order(order, layers) for order in orders]


def _is(kind: type, value: Any) -> bool:
    """Return whether a value is a number of a kind; numpy's count, True and False do not."""
    return isinstance(value, kind) and type(value) is not bool


def _read_order(order: Mapping[str, Any], layers: Mapping[str, Any]) -> dict[str, Any]:
    layer, positions = order.get("layer"), order.get("positions", "all")
    expert: Any = order.get("expert")
    if str(layer) not in layers:
        raise ValueError(f"layer {layer} is not converted. Converted layers: {', '.join(layers)}.")
    count = layers[str(layer)].get("n_experts", 0)
    if not count:
        raise ValueError(
            f"layer {layer} is a {layers[str(layer)]['kind']}, which has no experts to steer. Steer a layer with experts."
        )
    if not _is(Integral, expert) or not 0 <= expert < count:
        raise ValueError(f"layer {layer} has no expert {expert}. It has experts 0 to {count - 1}.")
    how = [key for key in order if key not in ("layer", "expert", "positions")]
    if len(how) != 1 or how[0] not in STEERING:
        raise ValueError(
            f"steering of expert {expert} of layer {layer}: {', '.join(map(str, how)) or 'no change'}"
            f" given. Give exactly one of {', '.join(STEERING)}."
        )
    value = order[how[0]]
    if how[0] == "ablate":
        good = value is True
    else:
        good = _is(Real, value) and abs(value) <= 1e6  # False for NaN
    if not good:
        expected = "true" if how[0] == "ablate" else "a number from -1,000,000 to 1,000,000"
        raise ValueError(f"steering of expert {expert} of layer {layer}: {how[0]} is {value!r}; expected {expected}")
    if positions not in POSITIONS:
        raise ValueError(
            f"steering of expert {expert} of layer {layer}: positions {positions!r}; expected one of {', '.join(POSITIONS)}"
        )
    return {
        "layer": int(str(layer)),
        "expert": int(expert),
        how[0]: value if how[0] == "ablate" else float(value),
        "positions": positions,
    }


# Steering orders by id of the layer. Each thread (or asyncio task) has its own, so that several can steer one model at once.
_steered: ContextVar[Mapping[int, tuple[dict[str, Any], ...]]] = ContextVar("mxd_steered", default=MappingProxyType({}))
_counting = threading.Lock()  # guards `contexts` and `was_steered` of the layers


@contextmanager
def steering(layers: Sequence[Any], orders: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Steer `layers` in this thread within the context, each by the orders for its `index`."""
    thread, outer = threading.get_ident(), _steered.get()
    inner = {id(layer): tuple(order for order in orders if order["layer"] == layer.index) for layer in layers}
    token = _steered.set({**outer, **{key: outer.get(key, ()) + inner[key] for key in inner}})
    with _counting:
        for layer in layers:
            layer.contexts, layer.was_steered = [*layer.contexts, thread], True
    try:
        yield
    finally:
        _steered.reset(token)
        with _counting:
            for layer in layers:
                left = list(layer.contexts)
                left.remove(thread)
                layer.contexts = left


def orders_of(layer: Any) -> list[dict[str, Any]]:
    """Return a layer's steering orders in this thread: those of the checkpoint, then those of the enclosing contexts.

    Raises ValueError in a thread without a context while another thread steers the layer: its intended steering is unknown.
    """
    given = _steered.get()
    if layer.contexts and id(layer) not in given and threading.get_ident() not in layer.contexts:
        raise ValueError(
            "the model is steered in another thread, and this thread has no steering context. Run it within"
            " `with model.steered([]):` for no steering, or start the thread with `contextvars.copy_context().run` to inherit the steering."
        )
    return [*layer.steering, *given.get(id(layer), ())]
