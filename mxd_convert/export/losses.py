"""Losses of surrogates: FVU per layer and cross-entropy of the model, on text not used to estimate the means."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mxd_convert.base_model.capture import Activations, recording
from mxd_convert.base_model.swap import replaced
from mxd_convert.evaluation.by_document import Sums, ratio
from mxd_convert.evaluation.fidelity import cross_entropies
from mxd_convert.evaluation.variance import Variance
from mxd_convert.export.job import Job
from mxd_convert.export.surrogate import is_exact
from mxd_convert.modeling.layers_mxd import FactoredLayer, Transcoder


class LayerLoss:
    """Streaming FVU and L0 of one layer's surrogate."""

    def __init__(self, layer: FactoredLayer, surrogate: Transcoder) -> None:
        self.layer, self.surrogate = layer, surrogate
        device = layer.output_bias.device
        self.own, self.theirs, self.lost = (Variance(layer.d_out, device) for _ in range(3))
        self.active = torch.zeros((), dtype=torch.float64, device=device)
        self.few = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x_BI: Tensor, target_BO: Tensor | None) -> None:
        """Add tokens. x_BI: the layer's inputs. target_BO: the original MLP's outputs, None without a base model."""
        layer_BO, surrogate_BO = self.layer(x_BI).double(), self.surrogate(x_BI).double()
        self.lost.add(surrogate_BO, layer_BO)
        if target_BO is not None:
            self.own.add(layer_BO, target_BO.double())
            self.theirs.add(surrogate_BO, target_BO.double())
        coefficients = self.surrogate.encode(x_BI)
        active_B = ((coefficients if isinstance(coefficients, Tensor) else coefficients[0]) > 0).sum(-1)
        self.active += active_B.sum()
        self.few += (active_B < self.layer.k).sum()

    def figures(self) -> dict[str, Any]:
        """Return the layer's figures, keys as in docs/other-tools.md."""
        tokens, known = max(self.lost.tokens, 1), self.own.tokens > 0
        return {
            "kind": self.layer.kind,
            "exact": is_exact(self.layer),
            "n_experts": self.layer.n_experts,
            "k": self.layer.k if self.layer.sparsity == "topk" else None,
            "fvu_layer": self.own.fvu()[0] if known else None,
            "fvu_surrogate": self.theirs.fvu()[0] if known else None,
            "fvu_against_layer": self.lost.fvu()[0],
            "l0": (self.active / tokens).item(),
            "fewer_than_k": (self.few / tokens).item() if self.layer.sparsity == "topk" else None,
        }


@torch.no_grad()
def measure(job: Job, surrogates: dict[int, Transcoder], advance: Callable[..., None]) -> dict[str, Any]:
    """Return FVU per layer and cross-entropies (nats per token) of surrogates, on the job's measurement text.

    Keys as in docs/other-tools.md.

    Args:
        job: the export.
        surrogates: by layer index, as read back from their files.
        advance: called once per batch.
    """
    losses = {index: LayerLoss(layer, surrogates[index]) for index, layer in job.layers.items()}
    totals = Sums(job.blocks.documents, job.source.device)
    sites = list(job.sites.values())
    paths = {index: site.path for index, site in job.sites.items()}
    for batch in job.measurement:
        ids_BT = job.take(batch)
        counted_BT, document_P = job.counted(batch), job.document_of(batch)[:, 1:].flatten()

        def add(name: str, logits_BTV: Tensor, ids_BT: Tensor = ids_BT, document_P: Tensor = document_P) -> None:
            totals.add(name, cross_entropies(logits_BTV, ids_BT), document_P)

        totals.add("tokens", torch.ones_like(document_P), document_P)
        with recording(job.source, sites) as seen:
            logits = job.source(input_ids=ids_BT, use_cache=False).logits
        add("converted" if job.original is None else "base", logits)
        if job.original is not None:
            add("converted", job.converted(input_ids=ids_BT, use_cache=False).logits)
        for index, activations in seen.items():
            _add(losses[index], activations, counted_BT, job.original is not None)
        swaps = {"surrogates": list(paths)} | {str(index): [index] for index in paths}
        for name, indices in swaps.items():
            with replaced(job.converted, {paths[index]: surrogates[index] for index in indices}):
                add(name, job.converted(input_ids=ids_BT, use_cache=False).logits)
        advance()

    def rise(name: str, over: str) -> float | None:
        return ratio(totals[name] - totals[over], totals["tokens"])[0]

    known = job.original is not None
    return {
        "ce_base": totals.mean("base")[0] if known else None,
        "ce_converted": totals.mean("converted")[0],
        "ce_surrogates": totals.mean("surrogates")[0],
        "delta_ce_converted": rise("surrogates", "converted"),
        "delta_ce_base": rise("surrogates", "base") if known else None,
        "layers": {str(index): {**loss.figures(), "delta_ce": rise(str(index), "converted")} for index, loss in losses.items()},
    }


def _add(loss: LayerLoss, activations: Activations, counted_BT: Tensor, known: bool) -> None:
    loss.add(activations.inputs[counted_BT], activations.outputs[counted_BT] if known else None)
