"""Does the graph do what the checkpoint does? onnxruntime against PyTorch, which runs without a cache, on real text.

Ties in a top-k may fall one way here and another there, and then other experts write: so besides the largest difference there
is the share of tokens whose active experts are the same in every layer, and the largest difference over those that have
no other token, themselves included, with other experts before them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from mxd_convert.data import Blocks
from mxd_convert.evaluation.run import rows_a_batch
from mxd_convert.evaluation.steering import steered
from mxd_convert.modeling.modeling_mxd import Codes
from mxd_convert.onnx.runtime import Array, OnnxModel

BATCHES, LENGTHS, PASTS = (1, 2, 3), (1, 2, 33, 200), (0, 1, 40)
PROMPTS, NEW_TOKENS, LONGEST_PROMPT = 20, 64, 24
STEERED_BY = 5.0
# what passes; largest_difference in logits, or RELATIVE times the largest logit where that is more; the rest are shares and nats a token
TOLERANCES: dict[str, dict[str, float]] = {
    "fp32": {"largest_difference": 1e-4, "kl": 1e-4, "argmax_agreement": 0.995, "expert_agreement": 0.999, "delta_ce": 1e-3},
    "fp16": {"kl": 1e-2, "argmax_agreement": 0.95, "delta_ce": 5e-3},
    "int8": {"kl": 5e-2, "argmax_agreement": 0.85, "delta_ce": 2e-2},
}
RELATIVE = 1e-5
_AT_LEAST = ("argmax_agreement", "expert_agreement")


@dataclass
class Comparison:
    """Sums over the tokens that were compared."""

    tokens: int = 0
    agreeing: int = 0  # tokens with the same experts in every layer
    overlap: float = 0.0  # sum over tokens of the mean over layers
    argmax: int = 0
    kl: float = 0.0
    largest: float = 0.0
    largest_agreeing: float = 0.0  # over tokens that agree as do all before them
    largest_logit: float = 0.0
    seen: set[tuple[int, int, int]] = field(default_factory=set)

    def add(self, ours_BTV: Array, theirs_BTV: Array, overlap_BT: Array, mask_BT: Array) -> None:
        """theirs: PyTorch's logits. overlap: of the experts, 1 where they are the same. Padding, which stands on the left, does not count."""
        text_BT, agree_BT = mask_BT.astype(bool), overlap_BT == 1.0
        before_BT = np.logical_and.accumulate(agree_BT | ~text_BT, axis=1) & text_BT
        difference_BT = np.abs(ours_BTV - theirs_BTV).max(-1)
        self.tokens += int(text_BT.sum())
        self.agreeing += int((agree_BT & text_BT).sum())
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
            "largest_difference": self.largest_agreeing,
            "largest_difference_all": self.largest,
            "largest_logit": self.largest_logit,
            "kl": self.kl / self.tokens,
            "argmax_agreement": self.argmax / self.tokens,
            "expert_agreement": self.agreeing / self.tokens,
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
        ids = torch.tensor([prompt])
        settings = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=sorted(end) or None, pad_token_id=0)
        output = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        return [int(token) for token in output[0, len(prompt) :]]

    @contextmanager
    def steered(self, orders: list[dict[str, Any]]) -> Iterator[None]:
        with steered(self.model, orders):
            yield


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
    return {**sums.figures(), "batches": list(BATCHES), "lengths": sorted({c[1] for c in sums.seen}), "pasts": list(PASTS)}


def compare_steering(reference: Reference, graph: OnnxModel, stream: Array, room: int) -> dict[str, Any]:
    """The same with one expert of every layer steered at once, over one row."""
    orders = [
        {"layer": index, "expert": layer.n_experts // 2, "add": STEERED_BY, "positions": "all"}
        for index, layer in reference.layers.items()
    ]
    ids_BT, _ = _rows(stream, 0, 1, min(64, room))
    mask_BT, sums = np.ones_like(ids_BT), Comparison()
    with reference.steered(orders):
        theirs, experts = reference.run(ids_BT, mask_BT)
    step = graph.step(ids_BT, graph.start(1), mask_BT, orders)
    plain = graph.step(ids_BT, graph.start(1), mask_BT)
    overlap_BT = np.sum([overlap_of(step.experts[index], codes) for index, codes in experts.items()], axis=0)
    sums.add(step.logits, theirs, _mean(overlap_BT, len(experts)), mask_BT)
    return {**sums.figures(), "moved": float(np.abs(step.logits - plain.logits).max())}


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
    at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    ids_BT = np.array([theirs[:at]], dtype=np.int64)
    logits, experts = reference.run(ids_BT, np.ones_like(ids_BT))
    if abs(float(logits[0, -1, ours[at]] - logits[0, -1, theirs[at]])) <= 2 * tolerance:
        return True
    step = telling.step(ids_BT, telling.start(1))
    return any((overlap_of(step.experts[index], codes) < 1.0).any() for index, codes in experts.items())


def cross_entropies(reference: Reference, graphs: dict[str, OnnxModel], blocks: Blocks) -> dict[str, float]:
    """Mean cross-entropy over the blocks' predicted tokens, nats: of PyTorch ("") and of each graph, on the same tokens."""
    sums = dict.fromkeys(("", *graphs), 0.0)
    vocabulary = reference.model.config.get_text_config().vocab_size
    rows = min(rows_a_batch(blocks.context, vocabulary), 8)
    for start in range(0, len(blocks), rows):
        ids = blocks.take(slice(start, start + rows))
        ids_BT = ids.numpy()
        for name in sums:
            if name:
                logits = torch.from_numpy(graphs[name].step(ids_BT, graphs[name].start(len(ids_BT))).logits)
            else:
                logits = torch.from_numpy(reference.run(ids_BT, np.ones_like(ids_BT))[0])
            targets = ids[:, 1:].flatten()
            sums[name] += float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum"))
    count = len(blocks) * (blocks.context - 1)
    return {name: total / count for name, total in sums.items()}


def failures(dtype: str, figures: dict[str, Any]) -> list[str]:
    """What is out of tolerance, a line each."""
    found = []
    for name, bound in TOLERANCES[dtype].items():
        limit = max(bound, RELATIVE * figures["largest_logit"]) if name == "largest_difference" else bound
        value = figures[name]
        if value < limit if name in _AT_LEAST else value > limit:
            relation = "at least" if name in _AT_LEAST else "at most"
            found.append(f"{dtype}: {name.replace('_', ' ')} is {value:.3g}, and should be {relation} {limit:.3g}")
    greedy = figures.get("greedy")
    if greedy is not None and dtype == "fp32" and greedy["equal"] + greedy["explained"] < greedy["prompts"]:
        found.append(f"fp32: {greedy['equal']} of {greedy['prompts']} greedy continuations are PyTorch's")
    steering = figures.get("steering")
    if steering is not None and dtype == "fp32":
        limit = max(TOLERANCES["fp32"]["largest_difference"], RELATIVE * steering["largest_logit"])
        if steering["largest_difference"] > limit:
            found.append(f"fp32: steered logits differ by {steering['largest_difference']:.3g}, more than {limit:.3g}")
    return found


def _mean(overlaps_BT: Array, layers: int) -> Array:
    """Of sums over layers; 1 without layers that have experts."""
    return overlaps_BT / layers if layers else np.ones_like(overlaps_BT)


def _rows(stream: Array, start: int, rows: int, length: int) -> tuple[Array, int]:
    """(rows, length) of a text's tokens from `start`, going round at its end; and where the next begin."""
    at = (start + np.arange(rows * length)) % len(stream)
    return stream[at].reshape(rows, length).astype(np.int64), int(start + rows * length)
