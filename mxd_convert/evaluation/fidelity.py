"""Evaluate a converted model: one pass for the base's activations, then every variant of the model on the same tokens.

All variants see the same blocks, so differences in cross-entropy are paired. Figures describe the models passed in; `evaluate`
loads both from disk.
Shape suffixes: B blocks (in flat tensors: tokens), T tokens of a block, V vocabulary, O output width, N experts.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mxd_convert.base_model.capture import apply_mlp, recording
from mxd_convert.base_model.families import Site
from mxd_convert.base_model.swap import Constant, permuted_experts, replaced_mlps
from mxd_convert.data.blocks import Blocks
from mxd_convert.evaluation.layer_figures import LayerFigures
from mxd_convert.evaluation.progress import progress
from mxd_convert.evaluation.verdict import sentence, verdict
from mxd_convert.layers.losses import kl_terms
from mxd_convert.modeling.layers_mxd import FactoredLayer

PERMUTATIONS = 3  # of the experts of each layer, for routing necessity
_LOGITS = 2**22  # most logits of one batch


@torch.no_grad()
def evaluate_models(
    base: Any,
    converted: Any,
    sites: list[Site],
    blocks: Blocks,
    mask_bos: bool = True,
    device: torch.device | None = None,
    quiet: bool = False,
    twin: Any = None,
) -> dict[str, Any]:
    """Measure the fidelity and reliance of a converted model on all of `blocks`.

    Args:
        base: the base model.
        converted: the converted model, with layers of any kind at `sites`.
        sites: the MLPs that were replaced.
        blocks: the held-out text.
        mask_bos: whether BOS tokens and the first position of each block are left out of the figures of layers.
        device: where the models run; None for the CPU.
        quiet: whether to show no progress.
        twin: the dense twin as a separate model, if it was trained.

    Returns:
        The sections "fidelity" and "reliance" of mxd_report.json.
    """
    device = device or torch.device("cpu")
    base, converted, twin = base.to(device), converted.to(device), None if twin is None else twin.to(device)
    layers: dict[int, FactoredLayer] = converted.mxd_layers()
    rows = rows_a_batch(blocks.context, base.config.get_text_config().vocab_size)
    batches = [slice(start, start + rows) for start in range(0, len(blocks), rows)]
    steps = len(batches) * (3 + sum(3 + _permutations(layer) for layer in layers.values()))
    with progress(steps, quiet) as advance:
        figures = {index: LayerFigures(layer) for index, layer in layers.items()}
        for batch in batches:
            _activations(base, sites, blocks.take(batch).to(device), blocks, mask_bos, figures)
            advance()
        totals = Totals(device)
        for batch in batches:
            ids_BT = blocks.take(batch).to(device)
            if twin is not None:
                totals.add_cross_entropy("twin", twin(input_ids=ids_BT, use_cache=False).logits, ids_BT)
            _compare(base, converted, ids_BT, totals, sites, figures, blocks.counted(ids_BT, mask_bos).flatten())
            for name, context in _variants(base, sites, layers, figures):
                with context:
                    totals.add_cross_entropy(name, base(input_ids=ids_BT, use_cache=False).logits, ids_BT)
                advance()
    return _report(sites, figures, totals)


def rows_a_batch(context: int, vocabulary: int) -> int:
    """Return the number of blocks per batch. Their logits dominate the memory."""
    return max(1, min(64, _LOGITS // (context * vocabulary)))


def _activations(
    base: Any, sites: list[Site], ids_BT: Tensor, blocks: Blocks, mask_bos: bool, figures: dict[int, LayerFigures]
) -> None:
    counted_B = blocks.counted(ids_BT, mask_bos).flatten()
    with recording(base, sites) as seen:
        base(input_ids=ids_BT, use_cache=False)
        for index, activations in seen.items():
            figures[index].add(activations.inputs.flatten(0, 1), activations.outputs.flatten(0, 1), counted_B)


class Totals:
    """Sums over predicted tokens, in float64, by name."""

    def __init__(self, device: torch.device) -> None:
        self.tokens = 0
        self.sums: dict[str, Tensor] = {}
        self.device = device

    def add(self, name: str, value: Tensor) -> None:
        """Add a batch's sum, a scalar, to the total."""
        self.sums[name] = self.sums.get(name, torch.zeros((), dtype=torch.float64, device=self.device)) + value.double()

    def add_cross_entropy(self, name: str, logits_BTV: Tensor, ids_BT: Tensor) -> None:
        """Add the cross-entropy of each block's tokens but the first, in nats."""
        logits, targets = logits_BTV[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten()
        self.add(name, nn.functional.cross_entropy(logits, targets, reduction="none").sum(dtype=torch.float64))

    def mean(self, name: str) -> float:
        """Return the mean per predicted token."""
        return (self.sums[name] / self.tokens).item()


def _compare(
    base: Any,
    converted: Any,
    ids_BT: Tensor,
    totals: Totals,
    sites: list[Site],
    figures: dict[int, LayerFigures],
    counted_B: Tensor,
) -> None:
    with recording(base, sites) as originals:
        theirs = base(input_ids=ids_BT, use_cache=False).logits
    with recording(converted, sites) as seen:
        ours = converted(input_ids=ids_BT, use_cache=False).logits
    for site in sites:
        inputs, outputs = seen[site.index].inputs, seen[site.index].outputs.flatten(0, 1)[counted_B]
        local = apply_mlp(base, site, inputs).flatten(0, 1)[counted_B]
        figures[site.index].add_in_place(outputs, local, originals[site.index].outputs.flatten(0, 1)[counted_B])
    totals.tokens += ids_BT[:, 1:].numel()
    totals.add_cross_entropy("base", theirs, ids_BT)
    totals.add_cross_entropy("converted", ours, ids_BT)
    theirs, ours = theirs[:, :-1].float().log_softmax(-1), ours[:, :-1].float().log_softmax(-1)
    totals.add("kl", kl_terms(theirs, ours).sum(dtype=torch.float64))
    totals.add("top1", (theirs.argmax(-1) == ours.argmax(-1)).sum())


def _variants(
    base: Any, sites: list[Site], layers: dict[int, FactoredLayer], figures: dict[int, LayerFigures]
) -> Iterator[tuple[str, Any]]:
    """Yield (name, context) for every variant of the base model.

    All layers ablated to zero or to their mean; then one layer at a time, converted, ablated, and converted with its experts
    permuted.
    """
    zeros = {site.index: Constant(torch.zeros(site.d_out, device=layers[site.index].output_bias.device)) for site in sites}
    # the mean is over counted tokens only, because an attention sink would dominate it
    means = {site.index: Constant(figures[site.index].masked.mean_O().float()) for site in sites}
    yield "zero", replaced_mlps(base, sites, zeros)
    yield "mean", replaced_mlps(base, sites, means)
    for site in sites:
        index, layer = site.index, layers[site.index]
        yield f"{index}/alone", replaced_mlps(base, [site], layers)
        yield f"{index}/zero", replaced_mlps(base, [site], zeros)
        yield f"{index}/mean", replaced_mlps(base, [site], means)
        for number in range(_permutations(layer)):
            order_N = _permutation(figures[index].firings_N > 0, number)
            yield f"{index}/permuted", _both(replaced_mlps(base, [site], layers), permuted_experts(layer, order_N))


def _permutations(layer: FactoredLayer) -> int:
    return PERMUTATIONS if layer.n_experts else 0


@contextmanager
def _both(first: Any, second: Any) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(first)
        stack.enter_context(second)
        yield


def _permutation(fired_N: Tensor, number: int) -> Tensor:
    """Return an order of the experts, (N), that permutes those that fired among themselves. number: the seed."""
    alive = fired_N.nonzero().squeeze(-1).cpu()
    order_N = torch.arange(len(fired_N))
    order_N[alive] = alive[torch.randperm(len(alive), generator=torch.Generator().manual_seed(number))]
    return order_N.to(fired_N.device)


def _report(sites: list[Site], figures: dict[int, LayerFigures], totals: Totals) -> dict[str, Any]:
    base, converted = totals.mean("base"), totals.mean("converted")
    rises = {site.index: totals.mean(f"{site.index}/alone") - base for site in sites}
    fidelity_layers, reliance_layers = {}, {}
    for index, rise in rises.items():
        zero, mean = totals.mean(f"{index}/zero"), totals.mean(f"{index}/mean")
        alone = base + rise
        fidelity_layers[str(index)] = {
            **figures[index].report(),
            "delta_ce": rise,
            "recovered_zero": _recovered(alone, base, zero),
            "recovered_mean": _recovered(alone, base, mean),
        }
        necessity = None
        if figures[index].layer.n_experts and zero != alone:
            necessity = (totals.mean(f"{index}/permuted") / PERMUTATIONS - alone) / (zero - alone)
        reliance_layers[str(index)] = {**figures[index].shares(), "routing_necessity": necessity}
    zero, mean = totals.mean("zero"), totals.mean("mean")
    twin = totals.mean("twin") if "twin" in totals.sums else None
    alone_sum = sum(rises.values())
    return {
        "fidelity": {
            "tokens": totals.tokens,
            "ce_base": base,
            "ce_converted": converted,
            "delta_ce": converted - base,
            "ce_zero_ablation": zero,
            "ce_mean_ablation": mean,
            "recovered_zero": _recovered(converted, base, zero),
            "recovered_mean": _recovered(converted, base, mean),
            "kl": totals.mean("kl"),
            "top1_agreement": totals.mean("top1"),
            "compounding": (converted - base) / alone_sum if alone_sum > 0 else None,
            "layers": fidelity_layers,
        },
        "reliance": {
            "layers": reliance_layers,
            "dense_twin": None if twin is None else {"ce": twin, "delta_ce": twin - base, "gap": converted - twin},
            "verdict": verdict(reliance_layers),
            "sentence": sentence(reliance_layers, converted - base, None if twin is None else twin - base),
        },
    }


def _recovered(value: float, base: float, ablated: float) -> float | None:
    """Return 1 - rise / rise of the ablation: 1 for the base model, 0 for the ablation. None if the ablation changes nothing."""
    return 1.0 - (value - base) / (ablated - base) if ablated != base else None
