"""Steering: change experts' coefficients while the model runs, after top-k, whether or not they are active."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mxd_convert.errors import InputError
from mxd_convert.modeling.configuration_mxd import STEERING, read_steering


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
    """Within it, the coefficient of one expert of a converted model, or of several, is another.

    One of: `add` to it, `set` it, `scale` it, `ablate` it (to 0). positions: "all", "prompt", or "generation", which is what
    `generate` has written (the token chosen at the prompt's end is steered from its own position on). Works in plain forwards and in
    `generate`, with cache, batches and beams. Contexts nest, each working on what the one around it makes of the coefficient, after a
    preset of the checkpoint.

    A context belongs to its thread (or asyncio task), so several threads may steer one model at once. A thread that runs a model which
    another one steers must steer it too, or say `with steered(model, []):`.
    Raises InputError where the model has no such layer or expert.
    """
    given = {"add": add, "set": set, "scale": scale, "ablate": ablate or None}
    how = {name: value for name, value in given.items() if value is not None}
    if len(how) != 1:
        raise InputError(f"steer: give one of {', '.join(STEERING)}, not {', '.join(how) or 'none'}")
    experts = [expert] if isinstance(expert, int) else list(expert)
    with steered(model, [{"layer": layer, "expert": n, **how, "positions": positions} for n in experts]):
        yield


@contextmanager
def steered(model: Any, orders: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """The same for a list of orders: {"layer", "expert", "positions", and one of "add", "set", "scale", "ablate"}. Raises InputError."""
    checked_orders(model, orders)
    if not hasattr(model, "steered"):
        raise InputError(
            f"{type(model).__name__}: its code is that of an older mxd-convert, from its own folder; load it with mxd_convert.load"
        )
    with model.steered(orders):
        yield


def checked_orders(model: Any, orders: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Steering orders, completed. Raises InputError where the model can't follow one."""
    try:
        return read_steering(orders, model.config.mxd["layers"])
    except ValueError as error:
        raise InputError(str(error)) from None
