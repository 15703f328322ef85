"""Effects of a layer's experts on logits, and similar experts, for a range of experts at a time, from the record of one pass.

Shape suffixes: n experts of the range, N all experts of the layer, H hidden width, O output width, V vocabulary, T tokens shown,
S samples.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mxd_convert.evaluation.experts.decomposition import Unembedding
from mxd_convert.evaluation.experts.firings import Array
from mxd_convert.evaluation.experts.statistics import LayerRecord
from mxd_convert.modeling.layers_mxd import FactoredLayer

SHOWN = 10  # promoted tokens per expert, and suppressed tokens
SIMILAR = 8  # similar experts listed per expert
_ROWS = 4096  # experts converted to float64 at a time


@dataclass(frozen=True)
class Effects:
    """Direct effects of experts on the next token's logits, each (n, T): token ids, mean, and standard deviation.

    The mean is over all tokens where an expert fires, the deviation over its samples (`LayerRecord.samples_NSO`). Promoted tokens
    have the largest mean first, suppressed ones the smallest. Rows of experts that never fire are meaningless.
    """

    tokens: Array
    mean: Array
    spread: Array


class EffectsOfLayer:
    """The mean direct effect of a layer's experts on logits, defined as in `logit_effect`, for ranges of experts.

    index: of the layer. vocabulary: number of token ids that the tokenizer knows; larger ids are ignored.
    """

    def __init__(self, index: int, record: LayerRecord, unembedding: Unembedding, vocabulary: int) -> None:
        self.record, self.unembedding, self.vocabulary = record, unembedding, vocabulary
        self.outlet_O = unembedding.outlet_O[index]
        self.mean_O = unembedding.matrix_VO.mean(0)

    @torch.no_grad()
    def of(self, first: int, last: int) -> tuple[Effects, Effects]:
        """Return (promoted, suppressed) for experts `first` to `last` - 1."""
        record = self.record
        rows_nO = record.layer.experts[first:last].float() * self.outlet_O
        count_n = torch.from_numpy(record.firings.count_N[first:last]).clamp_min(1).to(rows_nO.device)
        logits_nV = self.unembedding.logits(record.written_NO[first:last] / count_n.unsqueeze(-1) * rows_nO)
        logits_nV = logits_nV[:, : self.vocabulary]
        shown = min(SHOWN, logits_nV.shape[1])
        samples_nSO = record.samples_NSO[first:last].to(rows_nO.device).float() * rows_nO.unsqueeze(1)
        drawn_n = torch.from_numpy(record.drawn_N[first:last]).to(rows_nO.device)
        found = []
        for largest in (True, False):
            mean_nT, tokens_nT = logits_nV.topk(shown, largest=largest)
            spread_nT = self._spread(samples_nSO, drawn_n, tokens_nT)
            found.append(Effects(*(tensor.cpu().numpy() for tensor in (tokens_nT, mean_nT, spread_nT))))
        return found[0], found[1]

    def _spread(self, samples_nSO: Tensor, drawn_n: Tensor, tokens_nT: Tensor) -> Tensor:
        matrix_nTO = self.unembedding.matrix_VO[tokens_nT] - self.mean_O
        effects_nST = samples_nSO @ matrix_nTO.transpose(1, 2)
        there_nS1 = (torch.arange(samples_nSO.shape[1], device=drawn_n.device) < drawn_n.unsqueeze(-1)).unsqueeze(-1)
        count_n1 = drawn_n.clamp_min(1).unsqueeze(-1)
        mean_nT = (effects_nST * there_nS1).sum(1) / count_n1
        deviation_nST = (effects_nST - mean_nT.unsqueeze(1)) * there_nS1
        return (deviation_nST.square().sum(1) / count_n1).sqrt()


@torch.no_grad()
def unit_rows(layer: FactoredLayer) -> Tensor:
    """Return the rows c_n scaled to unit norm, (N, O), in float32. Zero rows stay zero."""
    rows_NO: Tensor = layer.experts.float()
    return rows_NO / torch.linalg.vector_norm(rows_NO, dim=-1, keepdim=True).clamp_min(1e-12)


@torch.no_grad()
def similar(unit_NO: Tensor, first: int, last: int) -> tuple[Array, Array]:
    """Return each expert's SIMILAR nearest experts by cosine of their rows, and the cosines, (n, SIMILAR), largest first."""
    cosine_nN = unit_NO[first:last] @ unit_NO.T
    cosine_nN[torch.arange(last - first), torch.arange(first, last)] = -2  # itself
    values, indices = cosine_nN.topk(min(SIMILAR, cosine_nN.shape[1] - 1))
    return indices.cpu().numpy(), values.cpu().numpy()


@dataclass(frozen=True)
class Weights:
    """Rank and Frobenius norm of each expert's materialised weight `D diag(c_n)`, (H, O); arrays of (N)."""

    rank: Array
    norm: Array


@torch.no_grad()
def weights(layer: FactoredLayer) -> Weights | None:
    """Return rank (see `expert_rank`) and norm of all experts' weights; None for transcoders, which have no weight matrices."""
    if not layer.is_product:
        return None
    decoder_OH = layer.decoder.weight.double()
    squares_O = decoder_OH.square().sum(-1)
    norm_N = torch.cat([(rows.double().square() @ squares_O).sqrt() for rows in layer.experts.split(_ROWS)])
    there_NO = (layer.experts != 0).cpu().numpy()
    whole = int(torch.linalg.matrix_rank(decoder_OH))
    rank_N = np.full(len(there_NO), whole)
    full = whole == len(decoder_OH)  # the columns of D are independent, and so is every subset of them
    for n in np.flatnonzero(~there_NO.all(-1)):
        mask = torch.from_numpy(there_NO[n]).to(decoder_OH.device)
        left = int(mask.sum())
        rank_N[n] = left if full or left == 0 else int(torch.linalg.matrix_rank(decoder_OH[mask]))
    return Weights(rank_N, norm_N.cpu().numpy())
