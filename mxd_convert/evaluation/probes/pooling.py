"""Documents as vectors: every unit's mean coefficient over a document's tokens, without padding and BOS.

Shape suffixes: D documents, B documents of a batch, T tokens, N units (experts, latents or neurons), K active experts per token.
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
from mxd_convert.data.blocks import check_vocabulary
from mxd_convert.data.token_files import separators, special_ids
from mxd_convert.layers.sparse_ops import sparse_gate
from mxd_convert.modeling.layers_mxd import Coefficients, FactoredLayer

Array = np.ndarray[Any, np.dtype[Any]]
Matrix = Any  # pooled coefficients, (D, N) float32: a scipy CSR array, or a dense array if the coefficients are dense
Key = TypeVar("Key")

_BATCH_TOKENS = 4096  # most tokens per batch, padding included
_GATE_VALUES = 2**25  # most gate values per batch and layer: (B, T, N) before top-k


@dataclass(frozen=True)
class Documents:
    """The token ids of documents, and which of them count in the means; arrays of (T)."""

    ids: list[Array]
    counted: list[Array]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Return the number of tokens that count, over all documents."""
        return sum(int(counted.sum()) for counted in self.counted)

    def batches(self, tokens: int) -> Iterator[tuple[Array, Tensor, Tensor]]:
        """Yield (document numbers, ids (B, T), weights (B, T)), with documents of similar length together.

        Padding is at the end, where causal attention ignores it, and has weight 0. Each row of weights sums to 1.
        tokens: most tokens per batch, padding included; a longer document is a batch of its own.
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
    """Tokenise the beginning of each text as documents were tokenised for training, after BOS if the tokenizer uses one.

    BOS tokens and a special token in the first position don't count. Texts without counted tokens are dropped.

    Args:
        texts: the documents.
        tokenizer: the model's tokenizer.
        tokens: tokens kept per document, BOS included.
        vocabulary: number of token ids that the model knows.

    Returns:
        The documents, and the indices of the texts that were kept.

    Raises:
        InputError: a token id is outside the model's vocabulary.
    """
    marks = separators(tokenizer)
    before = len(marks.before)
    special = np.asarray(special_ids(tokenizer))
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
    for ids in found.ids:
        check_vocabulary(ids, vocabulary)
    return found, kept


class RandomGate:
    """The control: coefficients of a random gate, initialised like a new layer's and not trained.

    It has as many experts as `layer` and the same input. At most k experts are active per token. For `sparsity: l1`, which has no
    k, the limit at each token is the number that the layer itself has active.
    """

    def __init__(self, layer: FactoredLayer, seed: int) -> None:
        self.layer = layer
        bound = layer.d_in**-0.5
        weight_NI = torch.empty(layer.n_experts, layer.d_in).uniform_(
            -bound, bound, generator=torch.Generator().manual_seed(seed)
        )
        self.weight_NI = weight_NI.to(layer.output_bias.device)
        self.bias_N = self.weight_NI.new_zeros(layer.n_experts)

    def __call__(self, x_BTI: Tensor, _: Any = None) -> Coefficients:
        """Return the random gate's coefficients for the layer's inputs."""
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
    """Where the coefficients of `width` units come from: `coefficients` computes them from the module's first input and its output."""

    module: nn.Module
    width: int
    coefficients: Callable[[Tensor, Any], Coefficients]


def coefficients_of(layer: FactoredLayer) -> Source:
    """Return the source of a converted layer's coefficients, as its forward uses them."""
    return Source(layer.expert_acts, layer.n_experts, lambda gate, coefficients: coefficients)


def random_coefficients(layer: FactoredLayer, seed: int) -> Source:
    """Return the source of a random gate's coefficients on the layer's input."""
    return Source(layer, layer.n_experts, RandomGate(layer, seed))


def hidden_units(base: nn.Module, site: Site) -> Source:
    """Return the source of a base MLP's hidden units: the input of its down projection."""
    return Source(base.get_submodule(site.hidden), site.d_hidden, lambda hidden, output: hidden)


@torch.no_grad()
def pool(
    model: Any,
    sources: Mapping[Key, Source],
    documents: Documents,
    device: torch.device,
    advance: Callable[[int], None] = lambda steps: None,
) -> dict[Key, Matrix]:
    """Compute every source's mean coefficients over each document's counted tokens, with one forward per batch.

    Memory is taken by one batch and by the result, which is sparse if the coefficients are.

    Args:
        model: the model that all sources belong to.
        sources: where coefficients come from, by key.
        documents: the tokenised documents.
        device: where the model runs.
        advance: called with the number of documents of each finished batch.

    Returns:
        Pooled coefficients, (D, N), by key.
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
    coefficients = source.coefficients(inputs, output)
    if isinstance(coefficients, Tensor):
        codes_BTN = coefficients.float().reshape(*weight_BT.shape, -1)  # some models flatten (B, T) before the MLP
        rows.append(torch.einsum("btn,bt->bn", codes_BTN, weight_BT).cpu().numpy())
        return
    values_BTK, indices_BTK = coefficients
    weighted_BTK = values_BTK.float() * weight_BT.unsqueeze(-1)
    sums_BN = weighted_BTK.new_zeros(len(weight_BT), source.width)
    sums_BN.scatter_add_(1, indices_BTK.flatten(1), weighted_BTK.flatten(1))
    rows.append(scipy.sparse.csr_array(sums_BN.cpu().numpy()))


def _stack(parts: list[Matrix]) -> Matrix:
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else scipy.sparse.vstack(parts, format="csr")
