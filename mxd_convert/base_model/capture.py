"""One forward of a model -> (input, output) of every chosen MLP, or of whichever modules are watched."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mxd_convert.base_model.families import Site


@dataclass(frozen=True)
class Activations:
    """What one MLP saw and returned: (B, T, I) and (B, T, O)."""

    inputs: Tensor
    outputs: Tensor


class _Enough(Exception):
    """Raised by the hook of the last module needed, to stop the forward there."""


@contextmanager
def recording(model: nn.Module, sites: Sequence[Site], stop_early: bool = False) -> Iterator[dict[int, Activations]]:
    """Within it, every forward of `model` leaves the activations of the sites, by layer index, in the yielded dict.

    What an MLP saw and returned, whatever its surroundings do to it afterwards (Falcon adds to it in place), and as (B, T, ...) also where
    they flatten the tokens (OPT). With `stop_early` the forward ends (by an exception that `harvest` catches) once all sites have been seen.
    """
    seen: dict[int, Activations] = {}
    inputs: dict[int, Tensor] = {}
    lead: dict[int, torch.Size] = {}

    def before_layer(index: int) -> Any:
        def note(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            lead[index] = _first(arguments, keywords).shape[:-1]

        return note

    def before(index: int) -> Any:
        def note(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            inputs[index] = _kept(_first(arguments, keywords), lead[index])

        return note

    def after(index: int) -> Any:
        def record(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            seen[index] = Activations(inputs.pop(index), _kept(output, lead[index]))
            if stop_early and len(seen) == len(sites):
                raise _Enough

        return record

    handles = []
    for site in sites:
        layer, first, last = (model.get_submodule(path) for path in (site.layer, site.modules[0], site.modules[-1]))
        handles.append(layer.register_forward_pre_hook(before_layer(site.index), with_kwargs=True))
        handles.append(first.register_forward_pre_hook(before(site.index), with_kwargs=True))
        handles.append(last.register_forward_hook(after(site.index)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _first(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Tensor:
    found: Tensor = arguments[0] if arguments else next(iter(keywords.values()))
    return found


def _kept(tensor: Tensor, lead: torch.Size) -> Tensor:
    """A copy, (*lead, width)."""
    return tensor.detach().clone().reshape(*lead, tensor.shape[-1])


@torch.no_grad()
def apply_mlp(model: nn.Module, site: Site, x_BTI: Tensor) -> Tensor:
    """What the MLP at a site makes of given inputs."""
    for path in site.modules:
        x_BTI = model.get_submodule(path)(x_BTI)
    return x_BTI


@contextmanager
def watching(modules: Mapping[int, nn.Module]) -> Iterator[dict[int, Activations]]:
    """Input and output of modules by a number of their own, such as a converted model's layers, after every forward."""
    seen: dict[int, Activations] = {}

    def hook(index: int) -> Any:
        def record(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Tensor) -> None:
            seen[index] = Activations(_first(arguments, keywords).detach().clone(), output.detach().clone())

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
