"""Documents as vectors: the mean of every unit's coefficient over a document's tokens, without padding and BOS.

Shape suffixes: D documents, B documents of a batch, T tokens, N units (experts, latents or neurons), K active experts a token.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn

from mxd_convert.base_model.capture import observe
from mxd_convert.base_model.families import Site
from mxd_convert.data.blocks import separators
from mxd_convert.errors import InputError
from mxd_convert.layers.sparse_ops import sparse_gate
from mxd_convert.modeling.layers_mxd import Codes, FactoredLayer

Array = np.ndarray[Any, np.dtype[Any]]
Matrix = Any  # pooled coefficients, (D, N) float32: scipy's CSR array, or a dense array where every unit is active everywhere
Key = TypeVar("Key")

_BATCH_TOKENS = 4096
_GATE_VALUES = 2**25  # of one batch: a layer's gate is (B, T, N) before the top-k


@dataclass(frozen=True)
class Documents:
    """Token ids of documents, and which of them count in their means; arrays of (T)."""

    ids: list[Array]
    counted: list[Array]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """How many count, over all documents."""
        return sum(int(counted.sum()) for counted in self.counted)

    def batches(self, tokens: int) -> Iterator[tuple[Array, Tensor, Tensor]]:
        """(which documents, ids (B, T), weights (B, T)), documents of like length together; a row of weights sums to 1.

        Padded at the end, which causal attention never looks at, and weighted 0 there.
        """
        order = np.argsort([len(ids) for ids in self.ids], kind="stable")
        start = 0
        while start < len(order):
            stop = start + 1
            while stop < len(order) and (stop + 1 - start) * len(self.ids[order[stop]]) <= tokens:
                stop += 1
            rows, start = order[start:stop], stop
            ids_BT = torch.zeros(len(rows), len(self.ids[rows[-1]]), dtype=torch.int64)
            weight_BT = torch.zeros(ids_BT.shape)
            for b, row in enumerate(rows):
                length = len(self.ids[row])
                ids_BT[b, :length] = torch.from_numpy(self.ids[row])
                weight_BT[b, :length] = torch.from_numpy(self.counted[row]).float() / float(self.counted[row].sum())
            yield rows, ids_BT, weight_BT


def encode_documents(texts: list[str], tokenizer: Any, tokens: int, vocabulary: int) -> tuple[Documents, list[int]]:
    """(the first `tokens` tokens of each text, which texts): as the model was shown documents in training, after BOS where it wants one.

    What does not count is that BOS, any other, and a special token in the first position. Texts of which nothing counts are left out.
    Raises InputError where the tokenizer makes ids that the model does not know.
    """
    marks = separators(tokenizer)
    before = len(marks.before)
    special = np.asarray(sorted(tokenizer.all_special_ids))
    found, kept = Documents([], []), []
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    for number, plain in enumerate(encoded):
        ids = np.asarray([*marks.before, *plain[: max(0, tokens - before)]], dtype=np.int64)
        counted = np.arange(len(ids)) >= before
        if marks.bos is not None:
            counted &= ids != marks.bos
        counted[:1] &= ~np.isin(ids[:1], special)
        if counted.any():
            found.ids.append(ids)
            found.counted.append(counted)
            kept.append(number)
    largest = max((int(ids.max()) for ids in found.ids), default=0)
    if largest >= vocabulary:
        raise InputError(
            f"the tokenizer makes token ids up to {largest} and the model knows {vocabulary}; give the model the tokenizer it was trained with"
        )
    return found, kept


class RandomGate:
    """The coefficients of a gate that was drawn as a new layer's is and never trained: the control.

    It has as many experts as `layer` and reads the same input; at most k of them are active on a token, or, where the layer has no k
    (`sparsity: l1`), at most as many as the layer itself has active there.
    """

    def __init__(self, layer: FactoredLayer, seed: int) -> None:
        self.layer = layer
        bound = layer.d_in**-0.5
        weight_NI = torch.empty(layer.n_experts, layer.d_in).uniform_(
            -bound, bound, generator=torch.Generator().manual_seed(seed)
        )
        self.weight_NI = weight_NI.to(layer.output_bias.device)
        self.bias_N = self.weight_NI.new_zeros(layer.n_experts)

    def __call__(self, x_BTI: Tensor, _: Any = None) -> Codes:
        layer = self.layer
        if layer.sparsity == "topk":
            values, indices = sparse_gate(x_BTI.flatten(0, -2), self.weight_NI, self.bias_N, layer.k)
            return values.view(*x_BTI.shape[:-1], -1), indices.view(*x_BTI.shape[:-1], -1)
        theirs = layer.encode(x_BTI)
        assert isinstance(theirs, Tensor)
        active_BT1 = (theirs > 0).sum(-1, keepdim=True)
        gate_BTN = nn.functional.relu(x_BTI @ self.weight_NI.T)
        least_BT1 = gate_BTN.sort(-1, descending=True).values.gather(-1, (active_BT1 - 1).clamp_min(0))
        return gate_BTN.where((gate_BTN >= least_BT1) & (active_BT1 > 0), 0.0)


@dataclass(frozen=True)
class Source:
    """Where in a model the coefficients of `width` units come from: a function of the module's first input and its output."""

    module: nn.Module
    width: int
    codes: Callable[[Tensor, Any], Codes]


def coefficients_of(layer: FactoredLayer) -> Source:
    """A converted layer's coefficients, as the forward itself uses them."""
    return Source(layer.expert_acts, layer.n_experts, lambda gate, codes: codes)


def random_coefficients(layer: FactoredLayer, seed: int) -> Source:
    """Those of a gate nobody trained, on the same input."""
    return Source(layer, layer.n_experts, RandomGate(layer, seed))


def hidden_units(base: nn.Module, site: Site) -> Source:
    """The activated hidden units of an MLP of the base model: what goes into its down projection."""
    return Source(base.get_submodule(site.hidden), site.d_hidden, lambda hidden, output: hidden)


@torch.no_grad()
def pool(
    model: Any,
    sources: Mapping[Key, Source],
    documents: Documents,
    device: torch.device,
    advance: Callable[[int], None] = lambda steps: None,
) -> dict[Key, Matrix]:
    """Every source's mean coefficients over each document's counted tokens, (D, N), from one forward a batch. advance: of documents done.

    Takes memory for the result (sparse where the coefficients are) and for one batch.
    """
    model = model.to(device)
    widest = max(source.width for source in sources.values())
    rows_of: dict[Key, list[Matrix]] = {key: [] for key in sources}
    order: list[Array] = []
    for rows, ids_BT, weight_BT in documents.batches(min(_BATCH_TOKENS, _GATE_VALUES // widest)):
        see = {key: partial(_add, rows_of[key], source, weight_BT.to(device)) for key, source in sources.items()}
        observe(model, ids_BT.to(device), [(source.module, see[key]) for key, source in sources.items()])
        order.append(rows)
        advance(len(rows))
    back = np.argsort(np.concatenate(order))
    return {key: _stack(parts)[back] for key, parts in rows_of.items()}


def _add(rows: list[Matrix], source: Source, weight_BT: Tensor, inputs: Tensor, output: Any) -> None:
    codes = source.codes(inputs, output)
    if isinstance(codes, Tensor):
        codes_BTN = codes.float().reshape(*weight_BT.shape, -1)  # some models flatten their tokens before the MLP
        rows.append(torch.einsum("btn,bt->bn", codes_BTN, weight_BT).cpu().numpy())
        return
    values_BTK, indices_BTK = codes
    weighted_BTK = values_BTK.float() * weight_BT.unsqueeze(-1)
    sums_BN = weighted_BTK.new_zeros(len(weight_BT), source.width)
    sums_BN.scatter_add_(1, indices_BTK.flatten(1), weighted_BTK.flatten(1))
    rows.append(scipy.sparse.csr_array(sums_BN.cpu().numpy()))


def _stack(parts: list[Matrix]) -> Matrix:
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else scipy.sparse.vstack(parts, format="csr")
