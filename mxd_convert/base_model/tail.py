"""The part of a model after its last decoder layer: final norm, output embedding, and what a family adds to the logits.

Logits take more memory than anything else in a forward of a small model. The hidden states from which they are computed are a
hundred times smaller, so a caller that keeps these can compute the logits of a few tokens at a time. Shape suffixes: B blocks, T
tokens of a block, H hidden width, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from mxd_convert.base_model.capture import Enough
from mxd_convert.base_model.families import Site

TOLERANCE = 1e-4  # largest difference between logits with and without skipped layers, relative to the largest logit


@contextmanager
def skipping(layers: Sequence[nn.Module], lengths: Mapping[int, int], hidden_BTH: Tensor) -> Iterator[None]:
    """Let decoder layers return at once: the first returns `hidden_BTH`, the others their input.

    layers: the first layers of a model, in order. lengths: by number of the layer, the length of the tuple that it returns; 0 for a
    layer that returns a tensor.
    """

    def skip(number: int) -> Any:
        def forward(*arguments: Any, **keywords: Any) -> Any:
            passed = hidden_BTH if number == 0 else arguments[0] if arguments else keywords["hidden_states"]
            return (passed, *(None,) * (lengths[number] - 1)) if lengths[number] else passed

        return forward

    before = [layer.__dict__.get("forward") for layer in layers]  # accelerate sets one
    for number, layer in enumerate(layers):
        layer.__dict__["forward"] = skip(number)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            layer.__dict__.pop("forward")
            if forward is not None:
                layer.__dict__["forward"] = forward


def decoder_layers(model: Any, site: Site) -> list[nn.Module]:
    """Return all decoder layers of a model, in order. site: any of its sites."""
    return list(model.get_submodule(site.layer.rpartition(".")[0]))


class Tail:
    """The part of `model` after its last decoder layer. site: any of the model's sites."""

    def __init__(self, model: Any, site: Site) -> None:
        self.model, self.layers = model, decoder_layers(model, site)
        self._lengths: dict[int, int] = {}

    def hidden(self, ids_BT: Tensor) -> Tensor:
        """Return the output (B, T, H) of the last decoder layer for token ids, from a forward that stops there."""
        found: list[Tensor] = []
        last = len(self.layers) - 1

        def after(number: int) -> Any:
            def note(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
                self._lengths[number] = len(output) if isinstance(output, tuple) else 0
                if number == last:
                    found.append(output[0] if isinstance(output, tuple) else output)
                    raise Enough

            return note

        handles = [layer.register_forward_hook(after(number)) for number, layer in enumerate(self.layers)]
        try:
            with suppress(Enough):
                self.model(input_ids=ids_BT, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return found[0]

    def logits(self, hidden_BTH: Tensor) -> Tensor:
        """Return the logits (B, T, V) for outputs of the last decoder layer. `hidden` has to have run before."""
        ids_BT = torch.zeros(hidden_BTH.shape[:2], dtype=torch.long, device=hidden_BTH.device)
        with skipping(self.layers, self._lengths, hidden_BTH):
            logits: Tensor = self.model(input_ids=ids_BT, use_cache=False).logits
        return logits

    @torch.no_grad()
    def is_exact(self, ids_BT: Tensor) -> bool:
        """Return whether the logits from the last layer's output equal those of a whole forward.

        They don't if a model passes on more than hidden states, as models with their own code may.
        """
        expected_BTV = self.model(input_ids=ids_BT, use_cache=False).logits.float()
        try:
            logits_BTV = self.logits(self.hidden(ids_BT)).float()
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return False
        if logits_BTV.shape != expected_BTV.shape:
            return False
        limit = TOLERANCE * expected_BTV.abs().max().clamp_min(1e-30)
        return bool((logits_BTV - expected_BTV).abs().max() <= limit)
