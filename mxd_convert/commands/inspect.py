"""`inspect`: the active experts of every token, with coefficients, shares and labels."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mxd_convert.base_model.load import load_tokenizer
from mxd_convert.checkpoint.labels import read_labels, text_of
from mxd_convert.checkpoint.read import load_checkpoint
from mxd_convert.commands.generate import encode_prompt
from mxd_convert.errors import InputError
from mxd_convert.evaluation.experts.decomposition import decompose
from mxd_convert.recipe.schema import layer_indices


@dataclass(frozen=True)
class Firing:
    """An expert that is active on a token.

    Attributes:
        expert: Index of the expert.
        coefficient: Its coefficient.
        share: Norm of its contribution to the layer's output, divided by the sum of the norms over all active experts.
        label: Its label, if any.
    """

    expert: int
    coefficient: float
    share: float
    label: str | None


@dataclass(frozen=True)
class TokenView:
    """A token of the prompt.

    Attributes:
        position: Position in the prompt, from 0.
        id: Token id.
        text: Text of the token.
        layers: Active experts by layer index, largest contribution first.
    """

    position: int
    id: int
    text: str
    layers: dict[int, list[Firing]]

    def to_dict(self) -> dict[str, Any]:
        """Return the token and its experts as JSON-serialisable values."""
        return asdict(self)


def inspect(checkpoint: str | Path, prompt: str, layers: str | Sequence[int] = "all", most: int | None = None) -> list[TokenView]:
    """Return the active experts of a converted checkpoint for every token of a prompt.

    Args:
        checkpoint: Folder of the converted checkpoint.
        prompt: Text to run the model on.
        layers: Layer indices: [0, 2], "0-2" or "all".
        most: Maximum number of experts per token and layer. None: all that are active.

    Raises:
        InputError: The checkpoint or prompt can't be used, or a layer has no experts.
    """
    if most is not None and most < 1:
        raise InputError(f"--top {most}: expected at least 1")
    model, tokenizer = load_checkpoint(checkpoint), load_tokenizer(str(checkpoint))
    with_experts = [index for index, layer in model.mxd_layers().items() if layer.n_experts]
    try:
        wanted = with_experts if layers == "all" else layer_indices(layers if isinstance(layers, str) else list(layers), None)
    except ValueError as error:
        raise InputError(f"--{error}") from None
    for index in wanted:
        if index not in with_experts:
            have = ", ".join(map(str, with_experts)) or "none"
            raise InputError(f"--layers: layer {index} has no experts. Layers with experts: {have}.")
    if not wanted:
        raise InputError(f"{checkpoint}: none of its layers has experts to inspect")
    labels = text_of(read_labels(checkpoint))
    inputs = encode_prompt(tokenizer, prompt, model)
    decomposed = decompose(model, **inputs)
    ids = inputs["input_ids"][0].tolist()
    views = []
    for position, token in enumerate(ids):
        found: dict[int, list[Firing]] = {}
        for index in wanted:
            values, experts = decomposed[index].values[0, position].float(), decomposed[index].experts[0, position]
            norms = decomposed[index].contributions[0, position].float().norm(dim=-1)
            total = norms.sum().clamp_min(1e-30)
            order = [int(slot) for slot in torch.argsort(norms, descending=True) if values[slot] > 0]
            found[index] = [
                Firing(n, values[slot].item(), (norms[slot] / total).item(), labels.get((index, n)))
                for slot in order[:most]
                for n in [int(experts[slot])]
            ]
        views.append(TokenView(position, token, tokenizer.decode([token]), found))
    return views
