"""`inspect`: which experts fired, token by token, how strongly, and what each of them added."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mxd_convert.base_model.load import load_tokenizer
from mxd_convert.checkpoint.labels import read_labels, text_of
from mxd_convert.checkpoint.read import load_checkpoint
from mxd_convert.commands.generate import encoded
from mxd_convert.errors import InputError
from mxd_convert.evaluation.experts.decomposition import decompose
from mxd_convert.recipe.schema import layer_indices


@dataclass(frozen=True)
class Firing:
    """An expert that is active for a token. share: of the sum of the norms of what all active experts add."""

    expert: int
    coefficient: float
    share: float
    label: str | None


@dataclass(frozen=True)
class TokenView:
    """A token of the prompt. layers: the experts that are active for it, by layer index, those that add most first."""

    position: int
    id: int
    text: str
    layers: dict[int, list[Firing]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect(checkpoint: str | Path, prompt: str, layers: str | Sequence[int] = "all", most: int | None = None) -> list[TokenView]:
    """Which experts of a converted checkpoint fire on a prompt, token by token.

    layers: [0, 2], "0-2" or "all". most: experts to keep of each token and layer; None: all that are active. Raises InputError.
    """
    if most is not None and most < 1:
        raise InputError(f"--top {most}: ask for at least one expert")
    model, tokenizer = load_checkpoint(checkpoint), load_tokenizer(str(checkpoint))
    with_experts = [index for index, layer in model.mxd_layers().items() if layer.n_experts]
    try:
        wanted = with_experts if layers == "all" else layer_indices(layers if isinstance(layers, str) else list(layers), None)
    except ValueError as error:
        raise InputError(f"--{error}") from None
    for index in wanted:
        if index not in with_experts:
            have = ", ".join(map(str, with_experts)) or "none"
            raise InputError(f"--layers: layer {index} has no experts here; layers with some: {have}")
    if not wanted:
        raise InputError(f"{checkpoint}: none of its layers has experts to look at")
    labels = text_of(read_labels(checkpoint))
    inputs = encoded(tokenizer, prompt, model)
    parts = decompose(model, **inputs)
    ids = inputs["input_ids"][0].tolist()
    views = []
    for position, token in enumerate(ids):
        found: dict[int, list[Firing]] = {}
        for index in wanted:
            values, experts = parts[index].values[0, position].float(), parts[index].experts[0, position]
            norms = parts[index].contributions[0, position].float().norm(dim=-1)
            total = norms.sum().clamp_min(1e-30)
            order = [int(slot) for slot in torch.argsort(norms, descending=True) if values[slot] > 0]
            found[index] = [
                Firing(n, values[slot].item(), (norms[slot] / total).item(), labels.get((index, n)))
                for slot in order[:most]
                for n in [int(experts[slot])]
            ]
        views.append(TokenView(position, token, tokenizer.decode([token]), found))
    return views
