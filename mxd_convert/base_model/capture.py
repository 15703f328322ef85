"""Inputs and outputs of MLPs or other modules, recorded during a forward of the model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mxd_convert.base_model.families import Site


@dataclass(frozen=True)
class Activations:
    """The inputs (B, T, I) and outputs (B, T, O) of one MLP."""

    inputs: Tensor
    outputs: Tensor


class Enough(Exception):
    """Raised by the hook of the last module of interest to stop the forward there."""


@contextmanager
def recording(model: nn.Module, sites: Sequence[Site], stop_early: bool = False) -> Iterator[dict[int, Activations]]:
    """Yield a dict that every forward of `model` fills with the activations of the sites, by layer index.

    Activations are copies, because some models modify them in place (Falcon). Their shape is (B, T, ...), even if the decoder
    layer flattens its tokens (OPT).

    stop_early: whether the forward stops after the last site, by an exception that `harvest` catches.
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
                raise Enough

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
    """Return a copy of shape (*lead, width)."""
    return tensor.detach().clone().reshape(*lead, tensor.shape[-1])


@torch.no_grad()
def apply_mlp(model: nn.Module, site: Site, x_BTI: Tensor) -> Tensor:
    """Return the output (B, T, O) of the MLP at a site for the inputs (B, T, I)."""
    for path in site.modules:
        x_BTI = model.get_submodule(path)(x_BTI)
    return x_BTI


@contextmanager
def watching(modules: Mapping[int, nn.Module]) -> Iterator[dict[int, Activations]]:
    """Yield a dict that every forward fills with the activations of `modules`, by their keys, such as layer indices."""
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
    """Return the activations of all sites, by layer index, from one forward that stops after the last site."""
    with recording(model, sites, stop_early=True) as seen, suppress(Enough):
        model(input_ids=ids_BT, use_cache=False)
    return seen


@torch.no_grad()
def observe(model: nn.Module, ids_BT: Tensor, watched: Sequence[tuple[nn.Module, Callable[[Tensor, Any], None]]]) -> None:
    """Run one forward that passes each watched module's first input and its output to a function.

    watched: pairs of module and function. The forward stops after the last module.
    """
    waiting = set(range(len(watched)))

    def hook(number: int, see: Callable[[Tensor, Any], None]) -> Any:
        def look(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            see(arguments[0], output)
            waiting.discard(number)
            if not waiting:
                raise Enough

        return look

    handles = [module.register_forward_hook(hook(number, see)) for number, (module, see) in enumerate(watched)]
    try:
        with suppress(Enough):
            model(input_ids=ids_BT, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
