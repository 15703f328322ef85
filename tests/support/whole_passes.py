"""The evaluation by whole forwards of the model, one per variant and layer: the reference for evaluation/fidelity.py and its benchmark."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def hooked(model: nn.Module, hooks: dict[str, Callable[[Any, Any, Any], Any]]) -> Iterator[None]:
    """Register forward hooks by module path."""
    handles = [model.get_submodule(path).register_forward_hook(hook) for path, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def evaluate(base: Any, converted: Any, paths: dict[int, str], blocks: Any, rows: int, permutations: int = 3) -> dict[str, float]:
    """Return mean cross-entropies by name: base, converted, zero, mean, and `layer/variant` for each layer's variants.

    paths: of the modules that layers replace, by layer index. All tokens count for means, and every expert is permuted that fires.
    """
    layers = converted.mxd_layers()
    batches = [blocks.take(slice(start, start + rows)) for start in range(0, len(blocks), rows)]
    sums: dict[int, Tensor] = {}
    fired = {index: torch.zeros(layer.n_experts, dtype=torch.bool) for index, layer in layers.items()}
    tokens = 0

    def see(index: int) -> Callable[[Any, Any, Any], None]:
        def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
            flat = output.flatten(0, -2)
            sums[index] = sums.get(index, 0) + flat.double().sum(0)
            values, indices = layers[index].encode(arguments[0])
            fired[index][indices[values > 0]] = True

        return hook

    for ids in batches:
        tokens += ids.numel()
        with hooked(base, {path: see(index) for index, path in paths.items()}):
            base(input_ids=ids, use_cache=False)
    means = {index: total / tokens for index, total in sums.items()}

    def constant(value: Tensor) -> Callable[[Any, Any, Any], Tensor]:
        return lambda module, arguments, output: value.to(output).expand_as(output)

    def layer_of(index: int, number: int | None) -> Callable[[Any, Any, Any], Tensor]:
        layer = layers[index]

        def hook(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
            if number is None:
                return layer(arguments[0])
            alive = fired[index].nonzero().squeeze(-1)
            order = torch.arange(layer.n_experts)
            order[alive] = alive[torch.randperm(len(alive), generator=torch.Generator().manual_seed(number))]
            before = layer.experts.data
            layer.experts.data = before[order]
            try:
                return layer(arguments[0])
            finally:
                layer.experts.data = before

        return hook

    zeros = {index: torch.zeros_like(mean) for index, mean in means.items()}
    variants: dict[str, tuple[Any, dict[str, Any]]] = {"base": (base, {}), "converted": (converted, {})}
    for name, values in (("zero", zeros), ("mean", means)):
        variants[name] = (base, {path: constant(values[index]) for index, path in paths.items()})
    for index, path in paths.items():
        variants[f"{index}/alone"] = (base, {path: layer_of(index, None)})
        variants[f"{index}/zero"] = (base, {path: constant(zeros[index])})
        variants[f"{index}/mean"] = (base, {path: constant(means[index])})
        for number in range(permutations if layers[index].n_experts else 0):
            variants[f"{index}/permuted{number}"] = (base, {path: layer_of(index, number)})
    found = {}
    for name, (model, hooks) in variants.items():
        total = count = 0.0
        for ids in batches:
            with hooked(model, hooks):
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            total += nn.functional.cross_entropy(
                logits.to(torch.promote_types(logits.dtype, torch.float32)), ids[:, 1:].flatten(), reduction="sum"
            ).item()
            count += ids[:, 1:].numel()
        found[name] = total / count
    return found
