"""Does the graph do what the checkpoint does? onnxruntime against PyTorch, which runs without a cache, on real text.

Ties in a top-k may fall one way here and another there, and then other experts write: so besides the largest difference there
is the share of tokens whose active experts are the same in every layer, and the largest difference over those that have
no other token, themselves included, with other experts before them.
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
from mxd_convert.modeling.layers_mxd import Codes
from mxd_convert.onnx.runtime import Array, OnnxModel

BATCHES, LENGTHS, PASTS = (1, 2, 3), (1, 2, 33, 200), (0, 1, 40)
PROMPTS, NEW_TOKENS, LONGEST_PROMPT = 20, 64, 24
STEERED_TOKENS = 64
# what passes; largest_difference in logits, or RELATIVE times the largest logit where that is more; the rest are shares and nats a token
TOLERANCES: dict[str, dict[str, float]] = {
    "fp32": {"largest_difference": 1e-4, "kl": 1e-4, "argmax_agreement": 0.995, "expert_overlap": 0.999, "delta_ce": 1e-3},
    "fp16": {"kl": 1e-2, "argmax_agreement": 0.95, "delta_ce": 5e-3},
    "int8": {"kl": 5e-2, "argmax_agreement": 0.85, "delta_ce": 2e-2},
}
RELATIVE = 1e-5
_AT_LEAST = ("argmax_agreement", "expert_overlap")
_STEERED_OVERLAP = 0.99  # the tokens are fewer, and one weighs more


@dataclass
class Comparison:
    """Sums over the tokens that were compared."""

    tokens: int = 0
    finite: int = 0  # tokens whose logits are numbers
    agreeing: int = 0  # tokens with the same experts in every layer
    flips: int = 0  # tokens that are the first of their row to have others; what follows has them in its context
    overlap: float = 0.0  # sum over tokens of the mean over layers
    argmax: int = 0
    kl: float = 0.0
    largest: float = 0.0
    largest_agreeing: float = 0.0  # over tokens that agree as do all before them
    in_agreement: int = 0  # how many these are
    largest_logit: float = 0.0
    seen: set[tuple[int, int, int]] = field(default_factory=set)

    def add(self, ours_BTV: Array, theirs_BTV: Array, overlap_BT: Array, mask_BT: Array) -> None:
        """theirs: PyTorch's logits. overlap: of the experts, 1 where they are the same. Padding, which stands on the left, does not count."""
        text_BT, agree_BT = mask_BT.astype(bool), overlap_BT == 1.0
        before_BT = np.logical_and.accumulate(agree_BT | ~text_BT, axis=1) & text_BT
        difference_BT = np.abs(ours_BTV - theirs_BTV).max(-1)
        finite_BT = np.isfinite(difference_BT)
        difference_BT = np.where(finite_BT, difference_BT, np.inf)  # a maximum passes over what is no number
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
            self.kl += float((p.exp() * (p - q)).sum())

    def figures(self) -> dict[str, Any]:
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
    """The checkpoint in PyTorch, in float32."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers = {index: layer for index, layer in model.mxd_layers().items() if layer.experts is not None}

    @torch.no_grad()
    def run(self, ids_BT: Array, mask_BT: Array) -> tuple[Array, dict[int, Codes]]:
        """(logits, experts of every layer) of one forward over all of it."""
        seen: dict[int, Codes] = {}

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
        """The most likely token, again and again; `generate` would heed whatever else the generation settings ask for."""
        ids, cache = torch.tensor([prompt]), None
        written: list[int] = []
        while len(written) < new_tokens and not end.intersection(written[-1:]):
            output = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
            written.append(int(ids))
        return written

    def usual(self, ids_BT: Array) -> dict[int, tuple[int, int, float]]:
        """By layer: an expert that is active on a text, one that is not or hardly, and the mean coefficient of the active ones."""
        _, experts = self.run(ids_BT, np.ones_like(ids_BT))
        found = {}
        for index, codes in experts.items():
            n_experts = self.layers[index].n_experts
            if isinstance(codes, Tensor):
                sums_N, values = codes.flatten(0, -2).sum(0), codes
            else:
                sums_N = torch.zeros(n_experts).index_add_(0, codes[1].flatten(), codes[0].flatten())
                values = codes[0]
            active = values[values > 0]
            found[index] = (int(sums_N.argmax()), int(sums_N.argmin()), float(active.mean()) if active.numel() else 1.0)
        return found


def overlap_of(ours: Any, theirs: Codes) -> Array:
    """Of a token's active experts in either, the share that is active in both, (B, T); 1 where there are none. With l1, coefficients
    within 1e-5 of zero count as neither on nor off."""
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
    """(rows, tokens, past) within a model's `room` of positions."""
    lengths = sorted({min(length, room) for length in LENGTHS})
    return [(rows, length, past) for rows in BATCHES for length in lengths for past in PASTS if length + past <= room]


def compare(reference: Reference, graph: OnnxModel, stream: Array, room: int, advance: Callable[..., None]) -> dict[str, Any]:
    """Figures over all cases. graph: one that tells its experts. stream: token ids of a text."""
    sums, start = Comparison(), 0
    for rows, length, past in cases(room):
        total = past + length
        ids_BT, start = _rows(stream, start, rows, total)
        mask_BT = np.ones_like(ids_BT)
        for row in range(1, rows):  # padding on the left, of another length in every row, and never all of it
            mask_BT[row, : min(3 * row, total - 1)] = 0
        ids_BT = ids_BT * mask_BT
        theirs, experts = reference.run(ids_BT, mask_BT)
        cache, logits, overlap_BT = graph.start(rows), [], np.zeros((rows, total))
        for part in (slice(0, past), slice(past, total)):
            if part.stop > part.start:
                step = graph.step(ids_BT[:, part], cache, mask_BT[:, part])
                logits.append(step.logits)
                for index, codes in experts.items():
                    here = codes[:, part] if isinstance(codes, Tensor) else (codes[0][:, part], codes[1][:, part])
                    overlap_BT[:, part] += overlap_of(step.experts[index], here)
        sums.add(np.concatenate(logits, 1), theirs, _mean(overlap_BT, len(experts)), mask_BT)
        sums.seen.add((rows, length, past))
        advance()
    compared = {name: sorted({case[at] for case in sums.seen}) for at, name in enumerate(("batches", "lengths", "pasts"))}
    return {**sums.figures(), **compared}


def compare_steering(reference: Reference, graph: OnnxModel, stream: Array, room: int) -> dict[str, Any]:
    """The same with one expert steered at a time: of every layer one that is active and one that is not, by what is usual there."""
    ids_BT, _ = _rows(stream, 0, 1, min(STEERED_TOKENS, room))
    mask_BT, sums, moved = np.ones_like(ids_BT), Comparison(), math.inf
    plain = graph.step(ids_BT, graph.start(1), mask_BT).logits
    for index, (active, idle, usual) in reference.usual(ids_BT).items():
        for expert in {active, idle}:
            order = {"layer": index, "expert": expert, "add": usual}
            with steered(reference.model, [order]):
                theirs, experts = reference.run(ids_BT, mask_BT)
            step = graph.step(ids_BT, graph.start(1), mask_BT, [order])
            overlap_BT = np.sum([overlap_of(step.experts[i], codes) for i, codes in experts.items()], axis=0)
            sums.add(step.logits, theirs, _mean(overlap_BT, len(experts)), mask_BT)
            moved = min(moved, float(np.abs(step.logits - plain).max()))
    return {**sums.figures(), "moved": moved}


def compare_greedy(
    reference: Reference,
    graph: OnnxModel,
    telling: OnnxModel,
    blocks: Blocks,
    room: int,
    tolerance: float,
    advance: Callable[..., None],
) -> dict[str, Any]:
    """Greedy continuations of the beginnings of a text's blocks, the graph's in batches of four with padding on the left.

    A difference is explained where PyTorch's two best logits are within twice `tolerance`, or where the experts differ somewhere before
    (`telling`: the graph that tells them).
    """
    new_tokens = min(NEW_TOKENS, room - 4)
    longest = max(2, min(LONGEST_PROMPT, room - new_tokens, blocks.context))
    lengths = [4 + (5 * number) % max(longest - 3, 1) for number in range(PROMPTS)]
    prompts = [blocks.ids[number % len(blocks), :length].tolist() for number, length in enumerate(lengths)]
    equal = explained = 0
    for first in range(0, PROMPTS, 4):
        some = prompts[first : first + 4]
        for prompt, ours in zip(some, graph.continuations(some, new_tokens), strict=True):
            theirs = reference.continuation(prompt, new_tokens, graph.eos)
            if ours == theirs:
                equal += 1
            elif _explained(reference, telling, [*prompt, *ours], [*prompt, *theirs], tolerance):
                explained += 1
            advance()
    return {"prompts": PROMPTS, "new_tokens": new_tokens, "equal": equal, "explained": explained}


def _explained(reference: Reference, telling: OnnxModel, ours: list[int], theirs: list[int], tolerance: float) -> bool:
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if at is None:  # one goes on where the other has ended
        return False
    ids_BT = np.array([theirs[:at]], dtype=np.int64)
    logits, experts = reference.run(ids_BT, np.ones_like(ids_BT))
    if abs(float(logits[0, -1, ours[at]] - logits[0, -1, theirs[at]])) <= 2 * tolerance:
        return True
    step = telling.step(ids_BT, telling.start(1))
    return any((overlap_of(step.experts[index], codes) < 1.0).any() for index, codes in experts.items())


def cross_entropy(logits_of: Callable[[Array], Array], blocks: Blocks, vocabulary: int) -> float:
    """Mean over the blocks' predicted tokens, nats. logits_of: of token ids (B, T)."""
    total, rows = 0.0, min(rows_a_batch(blocks.context, vocabulary), 8)
    for start in range(0, len(blocks), rows):
        ids_BT = blocks.take(slice(start, start + rows))
        logits, targets = torch.from_numpy(logits_of(ids_BT.numpy())), ids_BT[:, 1:].flatten()
        total += float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum"))
    return total / (len(blocks) * (blocks.context - 1))


def bounds(dtype: str, largest_logit: float) -> dict[str, float]:
    """What a graph has to keep to, where logits are as large as `largest_logit`."""
    found = dict(TOLERANCES[dtype])
    if "largest_difference" in found and math.isfinite(largest_logit):
        found["largest_difference"] = max(found["largest_difference"], RELATIVE * largest_logit)
    return found


def failures(dtype: str, figures: dict[str, Any]) -> list[str]:
    """What is out of tolerance, a line each, the name of the graph before it."""
    found = _beyond(bounds(dtype, figures["largest_logit"]), figures)
    greedy, steering = figures.get("greedy"), figures.get("steering")
    if greedy is not None and dtype == "fp32" and greedy["equal"] + greedy["explained"] < greedy["prompts"]:
        found.append(f"{greedy['equal']} of {greedy['prompts']} greedy continuations are PyTorch's")
    if steering is not None:
        limits = bounds(dtype, steering["largest_logit"])
        del limits["delta_ce"]
        if "expert_overlap" in limits:
            limits["expert_overlap"] = _STEERED_OVERLAP
        found += [f"steered, {line}" for line in _beyond(limits, steering)]
        if not steering["moved"] > 0:
            found.append("steering changes nothing")
    return [f"{dtype}: {line}" for line in found]


def _beyond(limits: dict[str, float], figures: dict[str, Any]) -> list[str]:
    found = []
    if figures["not_finite"]:
        found.append(f"the logits of {figures['not_finite']} of {figures['tokens']} tokens are no numbers")
    for name, limit in limits.items():
        value = figures[name]
        if not (value >= limit if name in _AT_LEAST else value <= limit):  # also where it is no number
            relation = "at least" if name in _AT_LEAST else "at most"
            found.append(f"{name.replace('_', ' ')} is {value:.3g}, and should be {relation} {limit:.3g}")
    return found


def _mean(overlaps_BT: Array, layers: int) -> Array:
    """Of sums over layers; 1 without layers that have experts."""
    return overlaps_BT / layers if layers else np.ones_like(overlaps_BT)


def _rows(stream: Array, start: int, rows: int, length: int) -> tuple[Array, int]:
    """(rows, length) of a text's tokens from `start`, going round at its end; and where the next begin."""
    at = (start + np.arange(rows * length)) % len(stream)
    return stream[at].reshape(rows, length).astype(np.int64), int(start + rows * length)
