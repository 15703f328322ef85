"""Steering: change experts' coefficients, active or not, after top-k while the model runs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mxd_convert.errors import InputError
from mxd_convert.modeling.steering_mxd import STEERING, read_steering


@contextmanager
def steer(
    model: Any,
    layer: int,
    expert: int | Sequence[int],
    *,
    add: float | None = None,
    set: float | None = None,
    scale: float | None = None,
    ablate: bool = False,
    positions: str = "all",
) -> Iterator[None]:
    """Change the coefficients of one or several experts of a converted model within the context.

    Steering works in plain forwards and in `generate`, with cache, batches and beams. It applies after the checkpoint's own
    preset. Contexts nest: an inner one changes the coefficient that the outer one left.

    A context belongs to its thread (or asyncio task), so several threads may steer one model at once. Every other thread that
    runs the model meanwhile must steer it too, or run it under `with steered(model, []):`.

    Args:
        model: a converted model.
        layer: index of the layer.
        expert: one expert, or several.
        add: number to add to the coefficient.
        set: number that replaces the coefficient.
        scale: number to multiply the coefficient by.
        ablate: set the coefficient to 0. Give exactly one of `add`, `set`, `scale` and `ablate`.
        positions: "all", "prompt", or "generation" for the positions of generated tokens. The latter doesn't affect the choice
            of the first generated token.

    Raises:
        InputError: the model has no such layer or expert, or not exactly one change is given.
    """
    given = {"add": add, "set": set, "scale": scale, "ablate": ablate or None}
    how = {name: value for name, value in given.items() if value is not None}
    if len(how) != 1:
        raise InputError(f"steer: {' and '.join(how) or 'no change'} given. Give exactly one of {', '.join(STEERING)}.")
    experts = [expert] if isinstance(expert, int) else list(expert)
    with steered(model, [{"layer": layer, "expert": n, **how, "positions": positions} for n in experts]):
        yield


@contextmanager
def steered(model: Any, orders: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Apply a list of steering orders within the context.

    Args:
        model: a converted model.
        orders: mappings with "layer", "expert", "positions", and one of "add", "set", "scale" and "ablate"; see `steer`.

    Raises:
        InputError: the model has no such layer or expert, or its own code is too old to steer.
    """
    checked_orders(model, orders)
    if not hasattr(model, "steered"):
        raise InputError(
            f"{type(model).__name__} runs the code of an older mxd-convert from its own folder. Load it with mxd_convert.load."
        )
    with model.steered(orders):
        yield


def checked_orders(model: Any, orders: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return steering orders with their defaults filled in. Raises InputError if the model has no such layer or expert."""
    try:
        return read_steering(orders, model.config.mxd["layers"])
    except ValueError as error:
        raise InputError(str(error)) from None
