"""One forward of a model -> (input, output) of every chosen MLP, or of whichever modules are watched."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mxd_convert.architectures import Site


@dataclass(frozen=True)
class Activations:
    """What one MLP saw and returned: (B, T, I) and (B, T, O)."""

    inputs: Tensor
    outputs: Tensor


class _Enough(Exception):
    """Raised by the hook of the last module needed, to stop the forward there."""


@contextmanager
def recording(model: nn.Module, sites: list[Site], stop_early: bool = False) -> Iterator[dict[int, Activations]]:
    """Within it, every forward of `model` leaves the activations of the sites, by layer index, in the yielded dict.

    With `stop_early` the forward ends (by an exception that `harvest` catches) once all sites have been seen.
    """
    with watching({site.index: model.get_submodule(site.path) for site in sites}, stop_early) as seen:
        yield seen


@contextmanager
def watching(modules: Mapping[int, nn.Module], stop_early: bool = False) -> Iterator[dict[int, Activations]]:
    """The same for modules by a number of their own, such as a converted model's layers."""
    seen: dict[int, Activations] = {}

    def hook(index: int) -> Any:
        def record(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Tensor) -> None:
            inputs = arguments[0] if arguments else next(iter(keywords.values()))
            seen[index] = Activations(inputs.detach(), output.detach())
            if stop_early and len(seen) == len(modules):
                raise _Enough

        return record

    handles = [module.register_forward_hook(hook(index), with_kwargs=True) for index, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def harvest(model: nn.Module, sites: list[Site], ids_BT: Tensor) -> dict[int, Activations]:
    """The activations of all sites from one forward, which stops after the last of them."""
    with recording(model, sites, stop_early=True) as seen, suppress(_Enough):
        model(input_ids=ids_BT, use_cache=False)
    return seen


@torch.no_grad()
def observe(model: nn.Module, ids_BT: Tensor, watched: Sequence[tuple[nn.Module, Callable[[Tensor, Any], None]]]) -> None:
    """One forward in which every watched module's (first input, output) goes to the function beside it; it stops after the last of them."""
    waiting = set(range(len(watched)))

    def hook(number: int, see: Callable[[Tensor, Any], None]) -> Any:
        def look(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            see(arguments[0], output)
            waiting.discard(number)
            if not waiting:
                raise _Enough

        return look

    handles = [module.register_forward_hook(hook(number, see)) for number, (module, see) in enumerate(watched)]
    try:
        with suppress(_Enough):
            model(input_ids=ids_BT, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
