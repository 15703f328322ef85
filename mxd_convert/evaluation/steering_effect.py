"""What steering does, without a judge from outside: to the next token, to fluency, and to what samples have in common.

For an expert and a strength (in units of the 99th percentile of its active coefficients): the KL between the next token's distributions without
and with steering, at the ends of held-out contexts; the base model's perplexity of what the steered model writes; and how alike its samples are,
in their n-grams and in the base model's hidden states.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxd_convert.base_model.capture import watching
from mxd_convert.data.blocks import Blocks
from mxd_convert.errors import InputError
from mxd_convert.evaluation.experts.decomposition import sparse
from mxd_convert.evaluation.steering import steer

PERCENTILE = 0.99
_ROWS = 16  # blocks at a time


@dataclass(frozen=True)
class Expert:
    """An expert to steer. fires: on how many of the tokens looked at; unit: the 99th percentile of its coefficient there."""

    layer: int
    number: int
    fires: int
    unit: float


@dataclass(frozen=True)
class Effect:
    """One strength of one expert. Without steering all strengths of 0 are the same, the line to compare with.

    kl: mean over contexts, nats. perplexity: the base model's, of what was written. ngrams: mean Jaccard overlap of the token bigrams of two
    samples. embedding: mean cosine of two samples' mean hidden states in the base model, the mean of other, unsteered samples taken off.
    """

    layer: int
    expert: int
    strength: float
    coefficient: float
    kl: float
    perplexity: float
    ngrams: float
    embedding: float
    samples: list[list[int]]


@torch.no_grad()
def find_experts(
    model: Any, blocks: Blocks, wanted: Sequence[tuple[int, int]], count: int, seed: int, mask_bos: bool = True
) -> list[Expert]:
    """The wanted (layer, expert) pairs, or `count` drawn from those that fire on the text; with the unit of each.

    Raises InputError where a wanted one is not there or never fires, or none does.
    """
    layers = {index: layer for index, layer in model.mxd_layers().items() if layer.n_experts}
    for index, n in wanted:
        if index not in layers:
            raise InputError(
                f"--expert {index}:{n}: layer {index} has no experts here; layers with some: {', '.join(map(str, layers)) or 'none'}"
            )
        if not 0 <= n < layers[index].n_experts:
            raise InputError(f"--expert {index}:{n}: layer {index} has experts 0 to {layers[index].n_experts - 1}")
    found: dict[int, list[tuple[Tensor, Tensor]]] = {index: [] for index in layers}
    for start in range(0, len(blocks), _ROWS):
        ids_BT = blocks.take(slice(start, start + _ROWS))
        counted = blocks.counted(ids_BT, mask_bos).flatten()
        with watching(layers) as seen:
            model(input_ids=ids_BT, use_cache=False)
        for index, layer in layers.items():
            values, experts = (codes.flatten(0, 1)[counted] for codes in sparse(layer.encode(seen[index].inputs)))
            active = values > 0
            found[index].append((values[active].float(), experts[active].int()))
    codes = {index: tuple(map(torch.cat, zip(*parts, strict=True))) for index, parts in found.items()}
    if not wanted:
        alive = [(index, int(n)) for index, (_, experts) in codes.items() for n in experts.unique()]
        if not alive:
            raise InputError("no expert fires on this text, so there is none to steer; give other text")
        order = torch.randperm(len(alive), generator=torch.Generator().manual_seed(seed))[:count]
        wanted = sorted(alive[place] for place in order.tolist())
    chosen = []
    for index, n in wanted:
        values = codes[index][0][codes[index][1] == n]
        if not len(values):
            raise InputError(
                f"--expert {index}:{n}: never fires on this text, so its coefficients have no scale; give another expert or text"
            )
        chosen.append(Expert(index, n, len(values), values.quantile(PERCENTILE).item()))
    return chosen


class SteeringEffect:
    """Measures experts of a converted model, both in float32 on the CPU or both on one device.

    contexts: token ids (B, T) at whose ends the next token is compared. prompt: token ids (T) that the samples begin with.
    """

    def __init__(self, model: Any, base: Any, contexts: Tensor, prompt: Tensor, samples: int, new_tokens: int, seed: int) -> None:
        self.model, self.base, self.contexts, self.prompt = model, base, contexts, prompt
        self.samples, self.new_tokens, self.seed = samples, new_tokens, seed
        self.plain = self._next()
        self.unsteered = self._write()
        # of other samples: the unsteered ones themselves would lie around their own mean
        self.centre = self._states(self._write(1)).mean(0)

    def none(self) -> Effect:
        """Without steering."""
        return Effect(-1, -1, 0.0, 0.0, 0.0, *self._figures(self.unsteered))

    def of(self, expert: Expert, strength: float) -> Effect:
        """With `strength` units of an expert added at every position."""
        amount = strength * expert.unit
        with torch.no_grad(), steer(self.model, expert.layer, expert.number, add=amount):
            steered = self._next()
            written = self._write()
        kl = (self.plain.exp() * (self.plain - steered)).sum(-1).mean().item()
        return Effect(expert.layer, expert.number, strength, amount, kl, *self._figures(written))

    @torch.no_grad()
    def _next(self) -> Tensor:
        """Log-probabilities of the next token after every context, (B, V)."""
        logits = [self.model(input_ids=ids, use_cache=False).logits[:, -1] for ids in self.contexts.split(_ROWS)]
        return torch.cat(logits).double().log_softmax(-1)

    def _write(self, more: int = 0) -> Tensor:
        """Samples at temperature 1, (S, new tokens). more: on the seed."""
        torch.manual_seed(self.seed + more)
        ids = self.prompt[None].expand(self.samples, -1)
        written = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.new_tokens,
            min_new_tokens=self.new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
        )
        return written[:, len(self.prompt) :]

    def _figures(self, written: Tensor) -> tuple[float, float, float, list[list[int]]]:
        return self._perplexity(written), ngram_overlap(written.tolist()), self._alike(written), written.tolist()

    @torch.no_grad()
    def _perplexity(self, written: Tensor) -> float:
        """The base model's, of the written tokens after the prompt."""
        ids = torch.cat([self.prompt[None].expand(len(written), -1), written], 1)
        logits = self.base(input_ids=ids, use_cache=False).logits[:, len(self.prompt) - 1 : -1].double()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), written.flatten())
        return math.exp(min(loss.item(), 700.0))

    @torch.no_grad()
    def _states(self, written: Tensor) -> Tensor:
        """The mean of each sample's last hidden states in the base model, (S, O)."""
        states = self.base(input_ids=written, use_cache=False, output_hidden_states=True).hidden_states[-1]
        return states.double().mean(1)

    def _alike(self, written: Tensor) -> float:
        states = torch.nn.functional.normalize(self._states(written) - self.centre, dim=-1)
        cosines = states @ states.T
        pairs = ~torch.eye(len(states), dtype=torch.bool)
        return cosines[pairs].mean().item() if pairs.any() else math.nan


def ngram_overlap(samples: Sequence[Sequence[int]], n: int = 2) -> float:
    """Mean Jaccard overlap of the sets of n-grams of two samples, over all pairs; nan with fewer than two samples."""
    sets = [set(zip(*(sample[i:] for i in range(n)), strict=False)) for sample in samples]
    overlaps = [len(a & b) / max(1, len(a | b)) for a, b in itertools.combinations(sets, 2)]
    return sum(overlaps) / len(overlaps) if overlaps else math.nan


def measure(
    effect: SteeringEffect, experts: Sequence[Expert], strengths: Sequence[float], advance: Callable[[], None]
) -> list[Effect]:
    """No steering, then every strength of every expert."""
    found = [effect.none()]
    for expert in experts:
        for strength in strengths:
            found.append(effect.of(expert, strength))
            advance()
    return found
