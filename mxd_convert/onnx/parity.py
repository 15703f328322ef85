"""Parity of an ONNX graph with its checkpoint: onnxruntime against PyTorch without a cache, on real text.

Near-ties in top-k may be resolved differently by the two runtimes, which activates different experts. The largest difference
of logits is therefore taken over tokens that, like all tokens before them in their row, have the same experts in every layer.
Agreement of experts is measured separately. Shape suffixes: B rows, T tokens, V vocabulary, N experts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mxd_convert.data.blocks import Blocks
from mxd_convert.evaluation.fidelity import rows_a_batch
from mxd_convert.evaluation.steering import steered
from mxd_convert.layers.losses import kl_terms
from mxd_convert.modeling.layers_mxd import Coefficients
from mxd_convert.onnx.runtime import Array, OnnxModel

BATCHES, LENGTHS, PASTS = (1, 2, 3), (1, 2, 33, 200), (0, 1, 40)  # rows, tokens per row, past tokens
PROMPTS, NEW_TOKENS, MAX_PROMPT = 20, 64, 24  # greedy continuations: number, tokens each, most tokens of a prompt
STEERED_TOKENS = 64  # most tokens in the comparison of steering
# limits per dtype: largest_difference in logits, or RELATIVE times the largest logit if that is more; kl and delta_ce in nats per
# token; the others are shares of tokens or experts
TOLERANCES: dict[str, dict[str, float]] = {
    "fp32": {"largest_difference": 1e-4, "kl": 1e-4, "argmax_agreement": 0.995, "expert_overlap": 0.999, "delta_ce": 1e-3},
    "fp16": {"kl": 1e-2, "argmax_agreement": 0.95, "delta_ce": 5e-3},
    "int8": {"kl": 5e-2, "argmax_agreement": 0.85, "delta_ce": 2e-2},
}
RELATIVE = 1e-5
_AT_LEAST = ("argmax_agreement", "expert_overlap")  # figures with a lower limit; the others have an upper one
_STEERED_OVERLAP = 0.99  # lower than for plain text: there are fewer tokens, so a single one counts more


@dataclass
class Comparison:
    """Sums over the compared tokens."""

    tokens: int = 0
    finite: int = 0  # tokens with finite logits
    agreeing: int = 0  # tokens with the same experts in every layer
    flips: int = 0  # tokens that are the first of their row with different experts
    overlap: float = 0.0  # sum over tokens of the mean over layers
    argmax: int = 0  # tokens with the same largest logit
    kl: float = 0.0  # nats
    largest: float = 0.0  # largest difference of logits
    largest_agreeing: float = 0.0  # the same over tokens that, like all tokens before them, have the same experts
    in_agreement: int = 0  # number of such tokens
    largest_logit: float = 0.0
    seen: set[tuple[int, int, int]] = field(default_factory=set)  # compared (rows, tokens, past)

    def add(self, ours_BTV: Array, theirs_BTV: Array, overlap_BT: Array, mask_BT: Array) -> None:
        """Add a batch of tokens.

        Args:
            ours_BTV: the graph's logits.
            theirs_BTV: PyTorch's logits.
            overlap_BT: overlap of the active experts, 1 where they are the same.
            mask_BT: 0 for padding, which is on the left and doesn't count.
        """
        text_BT, agree_BT = mask_BT.astype(bool), overlap_BT == 1.0
        before_BT = np.logical_and.accumulate(agree_BT | ~text_BT, axis=1) & text_BT
        difference_BT = np.abs(ours_BTV - theirs_BTV).max(-1)
        finite_BT = np.isfinite(difference_BT)
        difference_BT = np.where(finite_BT, difference_BT, np.inf)  # `max` below would drop a NaN
        self.tokens += int(text_BT.sum())
        self.finite += int((finite_BT & text_BT).sum())
        self.in_agreement += int(before_BT.sum())
        self.agreeing += int((agree_BT & text_BT).sum())
        self.flips += int((text_BT & ~agree_BT).any(1).sum())
        self.overlap += float(overlap_BT[text_BT].sum())
        self.argmax += int(((ours_BTV.argmax(-1) == theirs_BTV.argmax(-1)) & text_BT).sum())
        self.largest = max(self.largest, float(difference_BT[text_BT].max()))
        self.largest_agreeing = max(self.largest_agreeing, float(difference_BT[before_BT].max(initial=0.0)))
        self.largest_logit = max(self.largest_logit, float(np.abs(theirs_BTV[text_BT]).max()))
        for ours_V, theirs_V in zip(ours_BTV[text_BT], theirs_BTV[text_BT], strict=True):
            p, q = (torch.from_numpy(row).double().log_softmax(-1) for row in (theirs_V, ours_V))
            self.kl += float(kl_terms(p, q).sum())

    def figures(self) -> dict[str, Any]:
        """Return the figures of onnx_report.json."""
        return {
            "tokens": self.tokens,
            "not_finite": self.tokens - self.finite,
            "largest_difference": self.largest_agreeing if self.in_agreement else self.largest,
            "largest_difference_all": self.largest,
            "largest_logit": self.largest_logit,
            "kl": self.kl / self.tokens,
            "argmax_agreement": self.argmax / self.tokens,
            "expert_agreement": self.agreeing / self.tokens,
            "expert_flips": self.flips,
            "expert_overlap": self.overlap / self.tokens,
        }


class Reference:
    """The checkpoint in PyTorch, as the reference. model: the converted model, in float32."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers = {index: layer for index, layer in model.mxd_layers().items() if layer.experts is not None}

    @torch.no_grad()
    def run(self, ids_BT: Array, mask_BT: Array) -> tuple[Array, dict[int, Coefficients]]:
        """Return (logits (B, T, V), coefficients by layer) of one forward pass."""
        seen: dict[int, Coefficients] = {}

        def hook(index: int) -> Any:
            return lambda module, arguments, output: seen.__setitem__(index, output)

        handles = [layer.expert_acts.register_forward_hook(hook(index)) for index, layer in self.layers.items()]
        mask = torch.from_numpy(mask_BT)
        try:
            logits = self.model(
                input_ids=torch.from_numpy(ids_BT),
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                use_cache=False,
            ).logits
        finally:
            for handle in handles:
                handle.remove()
        return logits.numpy(), seen

    @torch.no_grad()
    def continuation(self, prompt: list[int], new_tokens: int, end: set[int]) -> list[int]:
        """Return the greedy continuation of a prompt. `generate` would apply the checkpoint's generation settings.

        end: end tokens, which stop the continuation and are included.
        """
        ids, cache = torch.tensor([prompt]), None
        generated: list[int] = []
        while len(generated) < new_tokens and not end.intersection(generated[-1:]):
            output = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
            generated.append(int(ids))
        return generated

    def usual(self, ids_BT: Array) -> dict[int, tuple[int, int, float]]:
        """Return, by layer, the most active expert on a text, the least active one, and the mean positive coefficient."""
        _, experts = self.run(ids_BT, np.ones_like(ids_BT))
        found = {}
        for index, coefficients in experts.items():
            n_experts = self.layers[index].n_experts
            if isinstance(coefficients, Tensor):
                sums_N, values = coefficients.flatten(0, -2).sum(0), coefficients
            else:
                sums_N = torch.zeros(n_experts).index_add_(0, coefficients[1].flatten(), coefficients[0].flatten())
                values = coefficients[0]
            active = values[values > 0]
            found[index] = (int(sums_N.argmax()), int(sums_N.argmin()), float(active.mean()) if active.numel() else 1.0)
        return found


def overlap_of(ours: Any, theirs: Coefficients) -> Array:
    """Return the share of the experts active in either that are active in both, (B, T); 1 for tokens without active experts.

    With `sparsity: l1`, experts that are active in one only, with a coefficient of at most 1e-5, are ignored.
    """
    if isinstance(theirs, Tensor):
        a, b = ours, theirs.numpy()
        both = ((a > 0) & (b > 0)).sum(-1)
        one = (((a > 0) != (b > 0)) & (np.maximum(a, b) > 1e-5)).sum(-1)
    else:
        (values, indices), (other_values, other_indices) = ours, (theirs[0].numpy(), theirs[1].numpy())
        same = (
            (indices[..., :, None] == other_indices[..., None, :]) & (values > 0)[..., :, None] & (other_values > 0)[..., None, :]
        )
        both = same.sum((-2, -1))
        one = (values > 0).sum(-1) + (other_values > 0).sum(-1) - 2 * both
    return np.asarray(both / np.maximum(both + one, 1) + (both + one == 0))


def cases(room: int) -> list[tuple[int, int, int]]:
    """Return the compared (rows, tokens, past) that fit in `room` positions."""
    lengths = sorted({min(length, room) for length in LENGTHS})
    return [(rows, length, past) for rows in BATCHES for length in lengths for past in PASTS if length + past <= room]


def compare(reference: Reference, graph: OnnxModel, stream: Array, room: int, advance: Callable[..., None]) -> dict[str, Any]:
    """Return the figures over all cases.

    Args:
        reference: the checkpoint.
        graph: the graph, with expert outputs.
        stream: token ids of a text, (tokens).
        room: most positions of the model.
        advance: called once per case.
    """
    sums, start = Comparison(), 0
    for rows, length, past in cases(room):
        total = past + length
        ids_BT, start = _rows(stream, start, rows, total)
        mask_BT = np.ones_like(ids_BT)
        for row in range(1, rows):  # left padding of a different length in every row, never the whole row
            mask_BT[row, : min(3 * row, total - 1)] = 0
        ids_BT = ids_BT * mask_BT
        theirs, experts = reference.run(ids_BT, mask_BT)
        cache, logits, overlap_BT = graph.empty_cache(rows), [], np.zeros((rows, total))
        for span in (slice(0, past), slice(past, total)):
            if span.stop > span.start:
                step = graph.step(ids_BT[:, span], cache, mask_BT[:, span])
                logits.append(step.logits)
                for index, coefficients in experts.items():
                    here = (
                        coefficients[:, span]
                        if isinstance(coefficients, Tensor)
                        else (coefficients[0][:, span], coefficients[1][:, span])
                    )
                    overlap_BT[:, span] += overlap_of(step.experts[index], here)
        sums.add(np.concatenate(logits, 1), theirs, _mean(overlap_BT, len(experts)), mask_BT)
        sums.seen.add((rows, length, past))
        advance()
    compared = {name: sorted({case[at] for case in sums.seen}) for at, name in enumerate(("batches", "lengths", "pasts"))}
    return {**sums.figures(), **compared}


def compare_steering(reference: Reference, graph: OnnxModel, stream: Array, room: int) -> dict[str, Any]:
    """Return the figures with one expert steered at a time: the most and the least active expert of every layer.

    Each is steered by the layer's mean positive coefficient. `moved`: smallest effect of any steering on the graph's logits,
    as the largest difference over tokens and vocabulary. Arguments as in `compare`.
    """
    ids_BT, _ = _rows(stream, 0, 1, min(STEERED_TOKENS, room))
    mask_BT, sums, moved = np.ones_like(ids_BT), Comparison(), math.inf
    plain = graph.step(ids_BT, graph.empty_cache(1), mask_BT).logits
    for index, (active, idle, usual) in reference.usual(ids_BT).items():
        for expert in {active, idle}:
            order = {"layer": index, "expert": expert, "add": usual}
            with steered(reference.model, [order]):
                theirs, experts = reference.run(ids_BT, mask_BT)
            step = graph.step(ids_BT, graph.empty_cache(1), mask_BT, [order])
            overlap_BT = np.sum([overlap_of(step.experts[i], coefficients) for i, coefficients in experts.items()], axis=0)
            sums.add(step.logits, theirs, _mean(overlap_BT, len(experts)), mask_BT)
            moved = min(moved, float(np.abs(step.logits - plain).max()))
    return {**sums.figures(), "moved": moved}


def compare_greedy(
    reference: Reference,
    graph: OnnxModel,
    with_experts: OnnxModel,
    blocks: Blocks,
    room: int,
    tolerance: float,
    advance: Callable[..., None],
) -> dict[str, Any]:
    """Return how many greedy continuations are equal, and how many of the others are explained by rounding.

    A difference is explained if PyTorch's logits of the two tokens are within twice `tolerance`, or if experts differ at an
    earlier token. The graph runs prompts in batches of four, padded on the left.

    Args:
        reference: the checkpoint.
        graph: the graph.
        with_experts: the graph with expert outputs.
        blocks: a text; its blocks' first tokens are the prompts.
        room: most positions of the model.
        tolerance: largest allowed difference of logits.
        advance: called once per prompt.
    """
    new_tokens = min(NEW_TOKENS, room - 4)
    longest = max(2, min(MAX_PROMPT, room - new_tokens, blocks.context))
    lengths = [4 + (5 * number) % max(longest - 3, 1) for number in range(PROMPTS)]
    prompts = [blocks.ids[number % len(blocks), :length].tolist() for number, length in enumerate(lengths)]
    equal = explained = 0
    for first in range(0, PROMPTS, 4):
        some = prompts[first : first + 4]
        for prompt, ours in zip(some, graph.continuations(some, new_tokens), strict=True):
            theirs = reference.continuation(prompt, new_tokens, graph.eos)
            if ours == theirs:
                equal += 1
            elif _explained(reference, with_experts, [*prompt, *ours], [*prompt, *theirs], tolerance):
                explained += 1
            advance()
    return {"prompts": PROMPTS, "new_tokens": new_tokens, "equal": equal, "explained": explained}


def _explained(reference: Reference, with_experts: OnnxModel, ours: list[int], theirs: list[int], tolerance: float) -> bool:
    """Return whether rounding explains the first difference of two continuations, see `compare_greedy`."""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if at is None:  # one is a prefix of the other
        return False
    ids_BT = np.array([theirs[:at]], dtype=np.int64)
    logits, experts = reference.run(ids_BT, np.ones_like(ids_BT))
    if abs(float(logits[0, -1, ours[at]] - logits[0, -1, theirs[at]])) <= 2 * tolerance:
        return True
    step = with_experts.step(ids_BT, with_experts.empty_cache(1))
    return any((overlap_of(step.experts[index], coefficients) < 1.0).any() for index, coefficients in experts.items())


def cross_entropy(logits_of: Callable[[Array], Array], blocks: Blocks, vocabulary: int) -> float:
    """Return the mean cross-entropy of the blocks' predicted tokens, in nats. logits_of: token ids (B, T) -> logits (B, T, V)."""
    total, rows = 0.0, min(rows_a_batch(blocks.context, vocabulary), 8)
    for start in range(0, len(blocks), rows):
        ids_BT = blocks.take(slice(start, start + rows))
        logits, targets = torch.from_numpy(logits_of(ids_BT.numpy())), ids_BT[:, 1:].flatten()
        total += float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum"))
    return total / (len(blocks) * (blocks.context - 1))


def bounds(dtype: str, largest_logit: float) -> dict[str, float]:
    """Return the limits of a graph's figures. largest_logit: largest absolute logit of the checkpoint."""
    found = dict(TOLERANCES[dtype])
    if "largest_difference" in found and math.isfinite(largest_logit):
        found["largest_difference"] = max(found["largest_difference"], RELATIVE * largest_logit)
    return found


def failures(dtype: str, figures: dict[str, Any]) -> list[str]:
    """Return one line per figure that is out of tolerance, starting with the dtype of the graph."""
    found = _beyond(bounds(dtype, figures["largest_logit"]), figures)
    greedy, steering = figures.get("greedy"), figures.get("steering")
    if greedy is not None and dtype == "fp32" and greedy["equal"] + greedy["explained"] < greedy["prompts"]:
        found.append(f"only {greedy['equal']} of {greedy['prompts']} greedy continuations are the same as in PyTorch")
    if steering is not None:
        limits = bounds(dtype, steering["largest_logit"])
        del limits["delta_ce"]
        if "expert_overlap" in limits:
            limits["expert_overlap"] = _STEERED_OVERLAP
        found += [f"with steering, {line}" for line in _beyond(limits, steering)]
        if not steering["moved"] > 0:
            found.append("steering has no effect")
    return [f"{dtype}: {line}" for line in found]


def _beyond(limits: dict[str, float], figures: dict[str, Any]) -> list[str]:
    """Return one line per figure beyond its limit."""
    found = []
    if figures["not_finite"]:
        found.append(f"{figures['not_finite']} of {figures['tokens']} tokens have logits that are not finite")
    for name, limit in limits.items():
        value = figures[name]
        if not (value >= limit if name in _AT_LEAST else value <= limit):  # true for NaN too
            relation = "at least" if name in _AT_LEAST else "at most"
            found.append(f"{name.replace('_', ' ')} is {value:.3g}; expected {relation} {limit:.3g}")
    return found


def _mean(overlaps_BT: Array, layers: int) -> Array:
    """Return the mean of overlaps summed over layers; 1 if no layer has experts."""
    return overlaps_BT / layers if layers else np.ones_like(overlaps_BT)


def _rows(stream: Array, start: int, rows: int, length: int) -> tuple[Array, int]:
    """Return (rows, length) tokens of a text from `start`, wrapping around at its end, and the start of the next ones."""
    at = (start + np.arange(rows * length)) % len(stream)
    return stream[at].reshape(rows, length).astype(np.int64), int(start + rows * length)
