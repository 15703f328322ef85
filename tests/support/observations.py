"""What experts do in a model, observed by plain hooks and explicit loops."""

import torch

from mxd_convert.base_model.capture import watching
from mxd_convert.evaluation.experts.decomposition import decompose_layer

LAYER = 2


class seen:
    """Record the coefficients of the layer at every forward, by a plain hook on `expert_acts`, and the gains it returned."""

    def __init__(self, model):
        self.layer, self.coefficients, self.gains = model.mxd_layers()[LAYER], [], []

    def __enter__(self):
        self.handles = [
            self.layer.expert_acts.register_forward_hook(lambda module, args, output: self.coefficients.append(output)),
            self.layer.gain.register_forward_hook(lambda module, args, output: self.gains.append(output)),
        ]
        return self.coefficients

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def ids_of(count=2, length=9):
    return torch.randint(1, 2048, (count, length), generator=torch.Generator().manual_seed(3))


def active_expert(model, ids) -> int:
    """Return the expert of the layer that fires on most of these tokens, but not on all."""
    with torch.no_grad(), seen(model) as coefficients:
        model(input_ids=ids)
    values, indices = coefficients[-1]
    counts = torch.bincount(indices[values > 0], minlength=24)
    return int(counts.where(counts < ids.numel(), 0).argmax())


@torch.no_grad()
def firings_by_loop(model, index: int, blocks, mask: str) -> dict[int, list[tuple[int, float]]]:
    """Return (position, coefficient) of every firing, by expert, found token by token."""
    layer, found = model.mxd_layers()[index], {}
    for block in range(len(blocks)):
        ids = blocks.take(slice(block, block + 1))
        with watching({index: layer}) as observed:
            model(input_ids=ids)
        parts, counted = decompose_layer(layer, observed[index].inputs), blocks.counted(slice(block, block + 1), mask)
        for position in range(blocks.context):
            if counted[0, position]:
                for n, value in zip(parts.experts[0, position].tolist(), parts.values[0, position].tolist(), strict=True):
                    if value > 0:
                        found.setdefault(n, []).append((block * blocks.context + position, value))
    return found
