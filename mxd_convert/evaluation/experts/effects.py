"""What the experts of a layer write, and which experts write alike: a few of them at a time, from the record of one pass.

Shape suffixes: n experts of the range, N all of the layer, H hidden width, O output width, V vocabulary, T tokens shown.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mxd_convert.evaluation.experts.decomposition import Unembedding
from mxd_convert.evaluation.experts.firings import Array
from mxd_convert.evaluation.experts.statistics import LayerRecord
from mxd_convert.modeling.layers_mxd import FactoredLayer

SHOWN = 10  # tokens promoted, and as many suppressed
SIMILAR = 8  # experts
_ROWS = 4096  # of which float64 copies are made at a time


@dataclass(frozen=True)
class Effects:
    """Direct effects on the logits of the next token, (n, T): token ids, mean over the tokens where the expert fires, standard deviation.

    The largest first (promoted), or the smallest first (suppressed). Those of experts that never fire mean nothing. The deviation is over
    `LayerRecord.samples`.
    """

    tokens: Array
    mean: Array
    spread: Array


class EffectsOfLayer:
    """The mean direct effect of a layer's experts, as `logit_effect` has it, for ranges of them. index: the layer's. vocabulary: ids that the
    tokenizer knows."""

    def __init__(self, index: int, record: LayerRecord, unembedding: Unembedding, vocabulary: int) -> None:
        self.record, self.unembedding, self.vocabulary = record, unembedding, vocabulary
        self.outlet_O = unembedding.outlet_O[index]
        self.mean_O = unembedding.matrix_VO.mean(0)

    @torch.no_grad()
    def of(self, first: int, last: int) -> tuple[Effects, Effects]:
        """(promoted, suppressed) of experts `first` to `last` - 1."""
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
    """The rows c_n with unit norm, (N, O), in float32; rows of 0 stay 0."""
    rows_NO: Tensor = layer.experts.float()
    return rows_NO / torch.linalg.vector_norm(rows_NO, dim=-1, keepdim=True).clamp_min(1e-12)


@torch.no_grad()
def similar(unit_NO: Tensor, first: int, last: int) -> tuple[Array, Array]:
    """The SIMILAR other experts whose rows have the largest cosine with each, (n, SIMILAR), the most similar first, and these cosines."""
    cosine_nN = unit_NO[first:last] @ unit_NO.T
    cosine_nN[torch.arange(last - first), torch.arange(first, last)] = -2  # itself
    values, indices = cosine_nN.topk(min(SIMILAR, cosine_nN.shape[1] - 1))
    return indices.cpu().numpy(), values.cpu().numpy()


@dataclass(frozen=True)
class Weights:
    """Of the experts' materialised weights `D diag(c_n)`, (H, O): rank and Frobenius norm, (N)."""

    rank: Array
    norm: Array


@torch.no_grad()
def weights(layer: FactoredLayer) -> Weights | None:
    """As `expert_rank` has it, for all experts; None where they have no weight matrices (transcoders)."""
    if layer.decoder is None:
        return None
    decoder_OH = layer.decoder.weight.double()
    squares_O = decoder_OH.square().sum(-1)
    norm_N = torch.cat([(rows.double().square() @ squares_O).sqrt() for rows in layer.experts.split(_ROWS)])
    there_NO = (layer.experts != 0).cpu().numpy()
    whole = int(torch.linalg.matrix_rank(decoder_OH))
    rank_N = np.full(len(there_NO), whole)
    full = whole == len(decoder_OH)  # D's columns are independent: those that are left are, too
    for n in np.flatnonzero(~there_NO.all(-1)):
        mask = torch.from_numpy(there_NO[n]).to(decoder_OH.device)
        left = int(mask.sum())
        rank_N[n] = left if full or left == 0 else int(torch.linalg.matrix_rank(decoder_OH[mask]))
    return Weights(rank_N, norm_N.cpu().numpy())
