"""Evaluate a converted model: whole forwards of base and converted model, then variants of single layers from there on.

All forwards see the same blocks, so differences in cross-entropy are paired. Standard errors are over documents. Figures describe
the models passed in; `evaluate` loads both from disk.

1. Per batch: the base model, the converted one, the base without its MLPs, and the dense twin.
2. Per batch: the base with every MLP replaced by its mean output, which is known after 1. (Where one layer is converted, 3 has both
   ablations if it runs on all blocks.)
3. Per batch of a subset of the blocks: the base, whose hidden states are kept, and from each layer on the layer's variants:
   converted, ablated to zero and to its mean, and converted with permuted experts. Jacobian faithfulness is measured here too.

Shape suffixes: B blocks (in flat tensors: tokens), T tokens of a block, V vocabulary, P predicted tokens, N experts.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mxd_convert.base_model.capture import Activations, apply_mlp, recording
from mxd_convert.base_model.families import Site
from mxd_convert.base_model.swap import Constant, permuted_experts, replaced_mlps
from mxd_convert.data.blocks import Blocks
from mxd_convert.evaluation.by_document import Estimate, Sums, ratio
from mxd_convert.evaluation.layer_figures import LayerFigures
from mxd_convert.evaluation.progress import progress
from mxd_convert.evaluation.suffix import Prefix
from mxd_convert.evaluation.token_kinds import TokenKinds
from mxd_convert.evaluation.verdict import NOT_APPLICABLE, sentence, verdict, verdict_of
from mxd_convert.layers.losses import kl_terms
from mxd_convert.modeling.layers_mxd import FactoredLayer
from mxd_convert.recipe.kinds import KINDS

PERMUTATIONS = 3  # of the experts of each layer, for routing necessity
VARIANT_PASSES = 8.0  # cost of all variants, in forwards of the whole text; the subset of blocks is chosen to stay below it
_LOGITS = 2**22  # most logits of one batch


@torch.no_grad()
def evaluate_models(
    base: Any,
    converted: Any,
    sites: list[Site],
    blocks: Blocks,
    mask: str = "bos",
    device: torch.device | None = None,
    quiet: bool = False,
    twin: Any = None,
    quick: bool = False,
    variant_share: float | None = None,
) -> dict[str, Any]:
    """Measure the fidelity and reliance of a converted model on all of `blocks`.

    Args:
        base: the base model.
        converted: the converted model, with layers of any kind at `sites`.
        sites: the MLPs that were replaced.
        blocks: the held-out text.
        mask: which tokens are left out of the figures of layers, as in `train.mask`; `figure_mask` gives it for a recipe.
        device: where the models run; None for the CPU.
        quiet: whether to show no progress.
        twin: the dense twin as a separate model, if it was trained.
        quick: whether to measure only the whole model's fidelity and the shares, in two forwards of the text.
        variant_share: share of the blocks for variants of single layers. None chooses it by VARIANT_PASSES.

    Returns:
        The sections "fidelity" and "reliance" of mxd_report.json, and "cost" with seconds and passes.
    """
    device = device or torch.device("cpu")
    base, converted, twin = base.to(device), converted.to(device), None if twin is None else twin.to(device)
    layers = converted.mxd_layers()
    share = 0.0 if quick else variant_passes(base, sites, layers)[0] if variant_share is None else variant_share
    evaluation = _Evaluation(base, converted, sites, layers, blocks, mask, device, _chosen(len(blocks), share), quick)
    rows = rows_a_batch(blocks.context, base.config.get_text_config().vocab_size)
    batches, chosen = (
        [some[start : start + rows] for start in range(0, len(some), rows)]
        for some in (np.arange(len(blocks)), evaluation.chosen)
    )
    # the ablations of a single layer are among its variants, if these run on all blocks
    ablated = not quick and (len(sites) > 1 or len(evaluation.chosen) < len(blocks))
    whole = ([("zero", base)] if ablated else []) + ([("twin", twin)] if twin is not None and not quick else [])
    start = time.monotonic()
    with progress(len(batches) * (2 + len(whole) + ablated) + len(chosen) * (1 + len(sites)), quiet) as advance:
        for batch in batches:
            evaluation.compare(batch, advance)
            for name, model in whole:
                evaluation.ablate(name, model, batch)
                advance()
        for batch in batches if ablated else ():
            evaluation.ablate("mean", base, batch)
            advance()
        for batch in chosen:
            evaluation.vary(batch, advance)
    full = round(evaluation.blocks_run / len(blocks), 3)
    cost = {"seconds": time.monotonic() - start, "full_passes": full, "suffix_passes": evaluation.suffixes}
    return {**evaluation.report(), "cost": {"evaluation": cost}}


def rows_a_batch(context: int, vocabulary: int) -> int:
    """Return the number of blocks per batch. Their logits dominate the memory."""
    return max(1, min(64, _LOGITS // (context * vocabulary)))


def variant_passes(base: Any, sites: Sequence[Site], layers: dict[int, FactoredLayer]) -> tuple[float, float]:
    """Return the share of the blocks for variants of single layers, and the cost of these on all blocks, in whole forwards.

    A forward costs in proportion to the parameters that it uses.
    """
    stack = base.get_submodule(sites[0].layer.rpartition(".")[0])
    embeddings, text = base.get_output_embeddings(), base.config.get_text_config()
    head = text.vocab_size * text.hidden_size if embeddings is None else embeddings.weight.numel()
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in stack]
    whole = sum(sizes) + head
    cost = sum((3 + _permutations(layers[site.index])) * (sum(sizes[site.index :]) + head) / whole for site in sites)
    return min(1.0, VARIANT_PASSES / cost), cost


def _chosen(blocks: int, share: float) -> np.ndarray[Any, Any]:
    """Return the rows of a share of the blocks, evenly spaced; at least one for a share above 0."""
    count = min(blocks, max(1, round(share * blocks))) if share > 0 else 0
    return np.unique(np.linspace(0, blocks - 1, count).round().astype(np.int64)) if count else np.zeros(0, dtype=np.int64)


@dataclass
class _Evaluation:
    """The sums of one evaluation.

    chosen: rows of the blocks on which variants run. suffixes: number of passes of these blocks through a suffix.
    blocks_run: number of blocks that went through a whole model. whole: whether suffixes are whole forwards; None before the check.
    """

    base: Any
    converted: Any
    sites: list[Site]
    layers: dict[int, FactoredLayer]
    blocks: Blocks
    mask: str
    device: torch.device
    chosen: np.ndarray[Any, Any]
    quick: bool
    suffixes: int = 0
    blocks_run: int = 0
    whole: bool | None = None
    figures: dict[int, LayerFigures] = field(init=False)
    totals: Sums = field(init=False)
    variants: Sums = field(init=False)  # on the chosen blocks

    def __post_init__(self) -> None:
        documents = self.blocks.documents
        self.figures = {index: LayerFigures(layer, documents, self.quick) for index, layer in self.layers.items()}
        self.totals, self.variants = Sums(documents, self.device), Sums(documents, self.device)
        self.kinds = TokenKinds(documents, self.device)

    def compare(self, rows: np.ndarray[Any, Any], advance: Callable[[], None]) -> None:
        """Run base and converted model on some blocks, and add the figures of all layers and of the whole model."""
        ids_BT, document_BT = self._take(rows)
        counted_B, document_B = self.blocks.counted(rows, self.mask).flatten().to(self.device), document_BT.flatten()
        with recording(self.base, self.sites) as originals:
            theirs_BTV = self.base(input_ids=ids_BT, use_cache=False).logits
        kind_BT = self.blocks.kinds(rows).to(self.device)
        for index, one in originals.items():
            self.figures[index].add(one.inputs.flatten(0, 1), one.outputs.flatten(0, 1), counted_B, document_B, kind_BT.flatten())
        advance()
        in_place = [] if self.quick else self.sites
        with recording(self.converted, in_place) as seen:
            ours_BTV = self.converted(input_ids=ids_BT, use_cache=False).logits
        for site in in_place:
            self._compare_layer(site, originals[site.index], seen[site.index], counted_B, document_B[counted_B])
        self.blocks_run += 2 * len(rows)
        document_P = document_BT[:, 1:].flatten()
        self.totals.add("tokens", torch.ones_like(document_P), document_P)
        losses = {"base": cross_entropies(theirs_BTV, ids_BT), "converted": cross_entropies(ours_BTV, ids_BT)}
        for name, loss_P in losses.items():
            self.totals.add(name, loss_P, document_P)
        chosen_P = torch.from_numpy(np.isin(rows, self.chosen)).to(self.device).repeat_interleave(ids_BT.shape[1] - 1)
        self.variants.add("converted", losses["converted"][chosen_P], document_P[chosen_P])
        theirs_PV, ours_PV = (_log_probs(logits_BTV) for logits_BTV in (theirs_BTV, ours_BTV))
        losses["kl"] = kl_terms(theirs_PV, ours_PV).sum(-1)
        self.totals.add("kl", losses["kl"], document_P)
        self.kinds.add(losses, kind_BT[:, :-1].flatten(), document_P)
        self.totals.add("top1_agreement", theirs_PV.argmax(-1) == ours_PV.argmax(-1), document_P)
        advance()

    def _compare_layer(self, site: Site, original: Activations, seen: Activations, counted_B: Tensor, document_B: Tensor) -> None:
        local = apply_mlp(self.base, site, seen.inputs).flatten(0, 1)[counted_B]
        outputs, teacher = seen.outputs.flatten(0, 1)[counted_B], original.outputs.flatten(0, 1)[counted_B]
        self.figures[site.index].add_in_place(outputs, local, teacher, document_B)

    def ablate(self, name: str, model: Any, rows: np.ndarray[Any, Any]) -> None:
        """Add the cross-entropy of the dense twin, or of the base with all MLPs ablated to zero or to their mean."""
        ids_BT, document_BT = self._take(rows)
        constants = {} if name == "twin" else {site.index: Constant(self._constant(site, name)) for site in self.sites}
        with replaced_mlps(model, self.sites if constants else [], constants):
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
        self.totals.add(name, cross_entropies(logits_BTV, ids_BT), document_BT[:, 1:].flatten())
        self.blocks_run += len(rows)

    def vary(self, rows: np.ndarray[Any, Any], advance: Callable[[], None]) -> None:
        """Add the cross-entropies of every layer's variants on some blocks, and the layers' Jacobian faithfulness."""
        ids_BT, document_BT = self._take(rows)
        document_P, counted_B = document_BT[:, 1:].flatten(), self.blocks.counted(rows, self.mask).flatten().to(self.device)
        prefix = Prefix.of(self.base, self.sites, ids_BT)
        self.blocks_run += len(rows)
        if self.whole is None:
            self.whole = not prefix.check(self.sites[-1])
            variants = sum(3 + _permutations(layer) for layer in self.layers.values())
            self.suffixes = 0 if self.whole else variants
        prefix.whole = self.whole
        self.variants.add("tokens", torch.ones_like(document_P), document_P)
        self.variants.add("base", cross_entropies(prefix.logits_BTV, ids_BT), document_P)
        advance()
        for site in self.sites:
            names = ["alone", "zero", "mean", *["permuted"] * _permutations(self.layers[site.index])]
            self.blocks_run += len(names) * len(rows) if self.whole else 0
            for name, logits_BTV in zip(names, prefix.run(site, len(names), self._outputs(site)), strict=True):
                self.variants.add(f"{site.index}/{name}", cross_entropies(logits_BTV, ids_BT), document_P)
            x_BI = prefix.activations[site.index].inputs.flatten(0, 1)
            self.figures[site.index].jacobian.add(
                x_BI[counted_B],
                document_BT.flatten()[counted_B],
                self.layers[site.index],
                functools.partial(_apply, self.base, site),
                seed=int(rows[0]),
            )
            advance()

    def _outputs(self, site: Site) -> Callable[[Tensor], list[Tensor]]:
        """Return the function from a layer's inputs to its outputs in each variant."""
        layer, fired_N = self.layers[site.index], self.figures[site.index].firings_N > 0

        def outputs(x_BTI: Tensor) -> list[Tensor]:
            coefficients = layer.encode(x_BTI)
            found = [layer.combine(x_BTI, coefficients)]
            found += [Constant(self._constant(site, name))(x_BTI) for name in ("zero", "mean")]
            for number in range(_permutations(layer)):
                with permuted_experts(layer, _permutation(fired_N, number)):
                    found.append(layer.combine(x_BTI, coefficients))
            return found

        return outputs

    def _constant(self, site: Site, name: str) -> Tensor:
        if name == "zero":
            return torch.zeros(site.d_out, device=self.device)
        # the mean is over counted tokens only, because an attention sink would dominate it
        mean_O = self.figures[site.index].masked.mean_O()
        return mean_O.to(self.layers[site.index].output_bias.dtype)

    def _take(self, rows: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
        """Return token ids and documents of some blocks, (B, T)."""
        return self.blocks.take(rows).to(self.device), self.blocks.document_of(rows).to(self.device)

    # --- report ----------------------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Return the sections "fidelity" and "reliance"."""
        kinds = {str(index): layer.kind for index, layer in self.layers.items()}
        reliance = {str(index): figures.reliance() for index, figures in self.figures.items()}
        fidelity = self._fidelity()
        layers: dict[str, Any] = {str(index): figures.fidelity() for index, figures in self.figures.items()}
        if not self.quick:
            fidelity |= self._ablations()
            for index in self.figures:
                layers[str(index)] |= self._variants_of(index)
                necessity = self._necessity(index)
                reliance[str(index)]["routing_necessity"], reliance[str(index)]["routing_necessity_se"] = necessity
        for name, layer in reliance.items():
            layer["verdict"] = verdict_of(layer) if KINDS[kinds[name]].is_product else NOT_APPLICABLE
        fidelity |= {"token_kinds": self.kinds.of_model(), "layers": layers, "by_document": self._by_document()}
        twin = self._twin() if "twin" in self.totals else None
        return {
            "fidelity": fidelity,
            "reliance": {
                "layers": reliance,
                "dense_twin": twin,
                "verdict": verdict(reliance, kinds),
                "sentence": sentence(reliance, kinds, twin),
            },
        }

    def _fidelity(self) -> dict[str, Any]:
        totals = self.totals
        found: dict[str, Any] = {"tokens": int(totals["tokens"].sum()), "documents": int((totals["tokens"] > 0).sum())}
        rise = ratio(totals["converted"] - totals["base"], totals["tokens"])
        figures = {"ce_base": totals.mean("base"), "ce_converted": totals.mean("converted"), "delta_ce": rise}
        figures |= {"kl": totals.mean("kl"), "top1_agreement": totals.mean("top1_agreement")}
        found |= _named(figures)
        if found["delta_ce"] is None:
            found["reason"] = f"the {'base' if found['ce_base'] is None else 'converted'} model's cross-entropy is not finite"
        return found

    def _ablations(self) -> dict[str, Any]:
        """Return the whole model's figures against ablations, and the sum of the layers' own rises to compare with."""
        totals, variants = self.totals, self.variants
        rise_D = totals["converted"] - totals["base"]
        alone_D = sum(variants[f"{index}/alone"] - variants["base"] for index in self.layers)
        assert isinstance(alone_D, Tensor)
        compounding = ratio(variants["converted"] - variants["base"], alone_D)
        zero_D, mean_D = (
            totals[name] if name in totals else variants[f"{self.sites[0].index}/{name}"] for name in ("zero", "mean")
        )
        figures = {
            "ce_zero_ablation": ratio(zero_D, totals["tokens"]),
            "ce_mean_ablation": ratio(mean_D, totals["tokens"]),
            "recovered_zero": _recovered(rise_D, zero_D - totals["base"]),
            "recovered_mean": _recovered(rise_D, mean_D - totals["base"]),
            "compounding": compounding if alone_D.sum() > 0 else (None, None),
        }
        tokens_D = variants["tokens"]
        return {**_named(figures), "variants": {"tokens": int(tokens_D.sum()), "documents": int((tokens_D > 0).sum())}}

    def _variants_of(self, index: int) -> dict[str, Any]:
        variants = self.variants
        rise_D = variants[f"{index}/alone"] - variants["base"]
        figures = {"delta_ce": ratio(rise_D, variants["tokens"])}
        for name in ("zero", "mean"):
            figures[f"recovered_{name}"] = _recovered(rise_D, variants[f"{index}/{name}"] - variants["base"])
        return {**_named(figures), "jacobian": self.figures[index].jacobian.report()}

    def _necessity(self, index: int) -> Estimate:
        if not self.layers[index].n_experts:
            return None, None
        alone_D = self.variants[f"{index}/alone"]
        benefit_D = self.variants[f"{index}/zero"] - alone_D
        if not benefit_D.sum() > 0:  # a layer without benefit has nothing to lose
            return None, None
        return ratio(self.variants[f"{index}/permuted"] / PERMUTATIONS - alone_D, benefit_D)

    def _twin(self) -> dict[str, Any]:
        totals = self.totals
        figures = {
            "ce": totals.mean("twin"),
            "delta_ce": ratio(totals["twin"] - totals["base"], totals["tokens"]),
            "gap": ratio(totals["converted"] - totals["twin"], totals["tokens"]),
        }
        return _named(figures)

    def _by_document(self) -> dict[str, list[float]] | None:
        """Return the tokens of each document and its mean figures, so that two evaluations of the same text can be paired.

        None if a figure is not finite.
        """
        tokens_D = self.totals["tokens"]
        used = tokens_D > 0
        found: dict[str, list[float]] = {"tokens": tokens_D[used].long().tolist()}
        names = {"ce_base": "base", "ce_converted": "converted", "kl": "kl", "top1_agreement": "top1_agreement"}
        for key, name in names.items():
            mean_D = self.totals[name][used] / tokens_D[used]
            if not mean_D.isfinite().all():
                return None
            found[key] = [round(value, 6) for value in mean_D.tolist()]
        return found


def _apply(base: Any, site: Site, x_PI: Tensor) -> Tensor:
    return apply_mlp(base, site, x_PI.unsqueeze(0)).squeeze(0)


def cross_entropies(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Return the cross-entropy of each predicted token, (P), in nats: of each block's tokens but the first."""
    return nn.functional.cross_entropy(_wide(logits_BTV[:, :-1].flatten(0, 1)), ids_BT[:, 1:].flatten(), reduction="none")


def _log_probs(logits_BTV: Tensor) -> Tensor:
    return _wide(logits_BTV[:, :-1].flatten(0, 1)).log_softmax(-1)


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 or, if it has it, float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _permutations(layer: FactoredLayer) -> int:
    return PERMUTATIONS if layer.n_experts else 0


def _permutation(fired_N: Tensor, number: int) -> Tensor:
    """Return an order of the experts, (N), that permutes those that fired among themselves. number: the seed."""
    alive = fired_N.nonzero().squeeze(-1).cpu()
    order_N = torch.arange(len(fired_N))
    order_N[alive] = alive[torch.randperm(len(alive), generator=torch.Generator().manual_seed(number))]
    return order_N.to(fired_N.device)


def _recovered(rise_D: Tensor, ablated_D: Tensor) -> Estimate:
    """Return 1 - rise / rise of the ablation: 1 for the base model, 0 for the ablation. None if the ablation changes nothing."""
    share, error = ratio(rise_D, ablated_D)
    return (None if share is None else 1.0 - share), error


def _named(figures: dict[str, Estimate]) -> dict[str, float | None]:
    """Return figures and, under the same names with `_se`, their standard errors."""
    return {key: value for name, pair in figures.items() for key, value in zip((name, f"{name}_se"), pair, strict=True)}
