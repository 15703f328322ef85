"""Forwards of the rest of a model, from a decoder layer on, with several modules in place of its MLP.

The hidden states at the input of a layer are the same for every module that replaces the layer's MLP. `Prefix` keeps those of
one forward. `run` then starts at the layer: all layers below return at once, and the modules run as copies along the batch axis.
Shape suffixes: B blocks, T tokens of a block, H hidden width, V vocabulary, I input width.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mxd_convert.base_model.capture import Activations, recording
from mxd_convert.base_model.families import Site
from mxd_convert.base_model.swap import replaced_mlps
from mxd_convert.base_model.tail import TOLERANCE, decoder_layers, skipping


class Copies(nn.Module):
    """A module that applies a function to the first of several equal copies along the batch axis, and stacks its results there."""

    def __init__(self, copies: int, function: Callable[[Tensor], Sequence[Tensor]]) -> None:
        super().__init__()
        self.copies, self.function = copies, function

    def forward(self, x_BTI: Tensor) -> Tensor:
        """Return one result per copy, stacked along the batch axis."""
        return torch.cat(list(self.function(x_BTI[: len(x_BTI) // self.copies])))


@dataclass
class Prefix:
    """The hidden states (B, T, H) at the input of decoder layers, from one forward of the model.

    layers: all decoder layers of the model, in order. ids_BT: the tokens. activations: of the MLPs, by layer index. tuples: whether a
    layer returns a tuple. whole: whether suffixes have to be whole forwards, because this model's layers pass on more than hidden
    states.
    """

    model: Any
    layers: Sequence[nn.Module]
    ids_BT: Tensor
    logits_BTV: Tensor
    activations: dict[int, Activations]
    hidden: dict[int, Tensor] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    whole: bool = False

    @classmethod
    def of(cls, model: Any, sites: Sequence[Site], ids_BT: Tensor) -> "Prefix":
        """Run the model on token ids (B, T), and keep the hidden states at the input of the sites' decoder layers."""
        layers = decoder_layers(model, sites[0])
        wanted = {site.index for site in sites}
        hidden: dict[int, Tensor] = {}
        lengths: dict[int, int] = {}

        def before(index: int) -> Any:
            def note(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
                if index in wanted:  # a copy: some families add to it in place
                    hidden[index] = (arguments[0] if arguments else keywords["hidden_states"]).clone()

            return note

        def after(index: int) -> Any:
            def note(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
                lengths[index] = len(output) if isinstance(output, tuple) else 0

            return note

        handles = [layer.register_forward_pre_hook(before(index), with_kwargs=True) for index, layer in enumerate(layers)]
        handles += [layer.register_forward_hook(after(index)) for index, layer in enumerate(layers)]
        try:
            with recording(model, sites) as seen:
                logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        return cls(model, layers, ids_BT, logits_BTV, dict(seen), hidden, lengths)

    def run(self, site: Site, copies: int, function: Callable[[Tensor], Sequence[Tensor]] | None) -> Tensor:
        """Return the logits (copies, B, T, V) with each of the function's results as the output of the MLP at a site.

        function: maps the MLP's input to `copies` outputs. None keeps the MLP.
        """
        with ExitStack() as stack:
            if function is not None:
                stack.enter_context(replaced_mlps(self.model, [site], {site.index: Copies(copies, function)}))
            if not self.whole:
                hidden = self.hidden[site.index]
                hidden = hidden.repeat(copies, *(1,) * (hidden.dim() - 1))
                stack.enter_context(skipping(self.layers[: site.index], self.lengths, hidden))
            logits = self.model(input_ids=self.ids_BT.repeat(copies, 1), use_cache=False).logits
        return logits.view(copies, *self.ids_BT.shape, -1)

    def check(self, site: Site) -> bool:
        """Return whether a suffix from a site's layer gives the logits of the whole forward."""
        try:
            logits_BTV = self.run(site, 1, None)[0]
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            return False
        difference = (logits_BTV - self.logits_BTV).abs().max()
        return bool(difference <= TOLERANCE * self.logits_BTV.abs().max().clamp_min(1e-30))
