"""One pass of a converted model over a text that records, for every expert, where it fires and what it writes.

Memory depends on the number of experts, not on the length of the text. Pairs of an expert and a token go to files (firings.py).
What an expert writes is kept as the sum over its firings, and as a few random samples for the spread.
Shape suffixes: B tokens, K active experts, N experts, O output width, P pairs of an expert and a token on which it fires,
S samples.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mxd_convert.base_model.swap import check_converted
from mxd_convert.data.blocks import Blocks
from mxd_convert.errors import InputError
from mxd_convert.evaluation.experts.decomposition import Unembedding
from mxd_convert.evaluation.experts.firings import Array, Firings, by_expert, mixed, rank_within, reserve
from mxd_convert.evaluation.progress import progress
from mxd_convert.modeling.layers_mxd import Coefficients, FactoredLayer

SAMPLES = 8  # firings per expert from which the spread of its effect is estimated
_GATES = 2**25  # gate values of one batch, over all experts
# keys of free slots are larger than any hash, and fall so that the first slot is filled first
_NEVER = np.uint64(2**64 - 1) - np.arange(SAMPLES, dtype=np.uint64)


@dataclass
class LayerRecord:
    """The record of one layer. For a transcoder, whose u is 1, the width O is 1 here.

    tokens: number of counted tokens. firings: all pairs. written_NO: the sum over an expert's firings of `a_n u s`, with the
    norms' scale s at the token. samples_NSO: `a_n u s` of up to SAMPLES firings per expert, drawn by a hash of expert and
    position, in a file.
    """

    layer: FactoredLayer
    folder: Path
    firings: Firings
    written_NO: Tensor
    samples_NSO: Tensor
    keys_NS: Array  # hashes of the samples
    tokens: int = 0

    @classmethod
    def create(cls, layer: FactoredLayer, folder: Path) -> "LayerRecord":
        """Create the record's files in a new folder. Raises OSError if the disk has no room for the samples."""
        n, width = layer.n_experts, layer.d_out if layer.is_product else 1
        firings = Firings.create(folder, n)
        written_NO = torch.zeros(n, width, device=layer.experts.device)
        size = n * SAMPLES * width
        reserve(folder / "samples", size * torch.bfloat16.itemsize)
        file = torch.from_file(str(folder / "samples"), shared=True, size=size, dtype=torch.bfloat16)
        return cls(layer, folder, firings, written_NO, file.view(n, SAMPLES, width), np.tile(_NEVER, (n, 1)))

    @property
    def drawn_N(self) -> Array:
        """Return the number of samples of each expert."""
        return np.minimum(self.firings.count_N, SAMPLES)

    def add(
        self, coefficients: Coefficients, linear_BO: Tensor | None, scale_B: Tensor, counted_B: Tensor, positions: Array
    ) -> None:
        """Add one batch.

        Args:
            coefficients: the layer's coefficients.
            linear_BO: u of the layer; None for ones.
            scale_B: the norms' scale at each token.
            counted_B: which tokens count.
            positions: positions of the counted tokens in the text.
        """
        token_P, expert_P, value_P = _pairs(coefficients, counted_B)
        self.tokens += len(positions)
        expert, token = expert_P.cpu().numpy(), token_P.cpu().numpy()
        self.firings.add(expert, positions[token], value_P.cpu().numpy())
        if len(expert) == 0:
            return
        scaled_BO = scale_B.unsqueeze(-1) if linear_BO is None else linear_BO.float() * scale_B.unsqueeze(-1)
        scaled_BO = scaled_BO[counted_B]
        order = by_expert(expert, self.layer.n_experts)
        expert, position = expert[order], positions[token[order]]
        begins = np.flatnonzero(np.diff(expert, prepend=-1))
        order_P, fired, offsets = (torch.from_numpy(array).to(token_P.device) for array in (order, expert[begins], begins))
        token_P, value_P = token_P[order_P], value_P[order_P]
        sums = F.embedding_bag(token_P, scaled_BO, offsets, mode="sum", per_sample_weights=value_P)
        self.written_NO.index_add_(0, fired, sums)
        self._draw(expert, position, token_P, value_P, scaled_BO)

    def _draw(self, expert_P: Array, position_P: Array, token_P: Tensor, value_P: Tensor, scaled_BO: Tensor) -> None:
        """Keep each expert's SAMPLES firings with the smallest hashes so far."""
        key_P = mixed(mixed(position_P, seed=5) + expert_P.astype(np.uint64), seed=6)
        key_P >>= np.uint64(1)  # smaller than the key of any free slot
        new = np.flatnonzero(key_P < self.keys_NS[expert_P].max(-1))
        touched, row = np.unique(expert_P[new], return_inverse=True)
        old = self.keys_NS[touched]
        rows = np.concatenate([np.repeat(np.arange(len(touched)), SAMPLES), row])
        keys = np.concatenate([old.ravel(), key_P[new]])
        order = np.lexsort((keys, rows))
        kept = np.zeros(len(keys), dtype=bool)
        kept[order] = rank_within(rows[order]) < SAMPLES
        free_row, free_slot = np.nonzero(~kept[: old.size].reshape(old.shape))
        enter = np.flatnonzero(kept[old.size :])
        enter = enter[np.argsort(row[enter], kind="stable")]  # sorted by expert, to match the freed slots one to one
        self.keys_NS[touched[free_row], free_slot] = key_P[new[enter]]
        chosen = torch.from_numpy(new[enter]).to(token_P.device)
        vectors = scaled_BO[token_P[chosen]] * value_P[chosen].unsqueeze(-1)
        self.samples_NSO[torch.from_numpy(touched[free_row]), torch.from_numpy(free_slot)] = vectors.bfloat16().cpu()


def _pairs(coefficients: Coefficients, counted_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (token, expert, coefficient) of every pair, in the order of tokens. Tokens are indices among the counted ones."""
    if isinstance(coefficients, Tensor):
        dense_BN = coefficients.flatten(0, -2)[counted_B]
        token_P, expert_P = (dense_BN > 0).nonzero(as_tuple=True)
        return token_P, expert_P, dense_BN[token_P, expert_P].float()
    values_BK, experts_BK = (tensor.flatten(0, -2)[counted_B] for tensor in coefficients)
    token_P, k_P = (values_BK > 0).nonzero(as_tuple=True)
    return token_P, experts_BK[token_P, k_P], values_BK[token_P, k_P].float()


@torch.no_grad()
def collect(
    model: Any,
    blocks: Blocks,
    folder: Path,
    layers: list[int] | None = None,
    mask: str = "bos",
    device: torch.device | None = None,
    quiet: bool = False,
) -> dict[int, LayerRecord]:
    """Run a converted model over all of `blocks` and record its experts.

    Args:
        model: a converted model.
        blocks: the text.
        folder: where files of the records are written. The records need them as long as they are used.
        layers: indices of layers with experts; None for all of them.
        mask: which tokens don't count: the recipe's `train.mask`.
        device: where the model runs; None for the CPU.
        quiet: whether to show no progress.

    Returns:
        The record of each chosen layer, by layer index.

    Raises:
        InputError: a chosen layer has no experts, no layer has any, or no token counts.
    """
    device = device or torch.device("cpu")
    model = model.to(device)
    chosen = chosen_layers(model, layers)
    records = {index: LayerRecord.create(layer, folder / str(index)) for index, layer in chosen.items()}
    unembedding = Unembedding.of(model)
    rows = max(1, min(64, _GATES // (blocks.context * max(layer.n_experts for layer in chosen.values()))))
    starts = range(0, len(blocks), rows)
    with progress(len(starts), quiet, "recording experts") as advance:
        for start in starts:
            batch = slice(start, start + rows)
            ids_BT = blocks.take(batch).to(device)
            with _watched(chosen) as (coefficients, linear), unembedding.scales() as scales:
                model.base_model(input_ids=ids_BT, use_cache=False)  # the logits are not needed
            counted_B = blocks.counted(batch, mask).flatten().to(device)
            positions = start * blocks.context + counted_B.nonzero().squeeze(-1).cpu().numpy()
            for index, record in records.items():
                record.add(coefficients[index], linear.get(index), scales.of(index).flatten(), counted_B, positions)
            advance()
    if not next(iter(records.values())).tokens:
        raise InputError(f"data: {blocks.info.path}: it has only BOS tokens, which don't count. Give other text.")
    for record in records.values():
        record.firings.sort()
    return records


def chosen_layers(model: Any, layers: list[int] | None) -> dict[int, FactoredLayer]:
    """Return the named layers, or by default all with experts, by index.

    Raises InputError if a named layer isn't converted or has no experts, or no layer has any.
    """
    every = model.mxd_layers()
    having = {index: layer for index, layer in every.items() if layer.n_experts}
    if not having:
        kinds = ", ".join(sorted({layer.kind for layer in every.values()}))
        raise InputError(f"the checkpoint's layers have no experts to show (kind: {kinds}). Give a checkpoint with experts.")
    for index in layers or []:
        check_converted(index, every, "--layers: ")
        if index not in having:
            raise InputError(
                f"--layers: layer {index} is a {every[index].kind}, which has no experts to show. Layers with experts: {', '.join(map(str, having))}."
            )
    return having if layers is None else {index: having[index] for index in sorted(layers)}


@contextmanager
def _watched(layers: dict[int, FactoredLayer]) -> Iterator[tuple[dict[int, Coefficients], dict[int, Tensor]]]:
    """Yield two dicts by layer index that every forward within the context fills.

    The first has the layers' coefficients, the second u, (B, O), of layers with a linear factor.
    """
    coefficients: dict[int, Coefficients] = {}
    linear: dict[int, Tensor] = {}

    def note_codes(index: int) -> Any:
        return lambda module, arguments, output: coefficients.__setitem__(index, output)

    def note_linear(index: int) -> Any:
        return lambda module, arguments, output: linear.__setitem__(index, output.flatten(0, -2))

    handles = []
    for index, layer in layers.items():
        handles.append(layer.expert_acts.register_forward_hook(note_codes(index)))
        if layer.is_product:
            handles.append(layer.decoder.register_forward_hook(note_linear(index)))
    try:
        yield coefficients, linear
    finally:
        for handle in handles:
            handle.remove()
