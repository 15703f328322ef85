"""Measure the effect of steering without an external judge: on the next token, on fluency, and on the similarity of samples.

Each expert is steered at several strengths, in units of the 99th percentile of its positive coefficients. Measured are the KL of
the next token's distribution from the unsteered one at the ends of held-out contexts, the base model's perplexity on generated
text, and the similarity of samples, by their n-grams and by the base model's hidden states.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mxd_convert.base_model.capture import watching
from mxd_convert.data.blocks import Blocks
from mxd_convert.errors import InputError
from mxd_convert.evaluation.experts.decomposition import sparse
from mxd_convert.evaluation.steering import steer
from mxd_convert.layers.losses import kl_terms

PERCENTILE = 0.99  # of an expert's positive coefficients: the unit of strength
_ROWS = 16  # blocks or contexts per forward


@dataclass(frozen=True)
class Expert:
    """An expert to steer.

    fires: number of tokens on which it fires. unit: the PERCENTILE of its coefficient on these tokens.
    """

    layer: int
    number: int
    fires: int
    unit: float


@dataclass(frozen=True)
class Effect:
    """The effect of steering one expert at one strength.

    coefficient: the number added, strength times the expert's unit. kl: mean over contexts, nats. perplexity: the base model's,
    on the samples. ngrams: mean Jaccard overlap of the token bigrams of two samples. embedding: mean cosine of two samples' mean
    hidden states in the base model, after subtracting the mean of other, unsteered samples. samples: generated token ids.
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
    model: Any, blocks: Blocks, wanted: Sequence[tuple[int, int]], count: int, seed: int, mask: str = "bos"
) -> list[Expert]:
    """Return the experts to steer, with the unit of each, from one pass over the text.

    Args:
        model: a converted model.
        blocks: the text on which coefficients are measured.
        wanted: (layer, expert) pairs; if empty, `count` experts are drawn from those that fire.
        count: number of experts to draw.
        seed: seed of the draw.
        mask: which tokens are ignored: the recipe's `train.mask`.

    Raises:
        InputError: a wanted expert doesn't exist or never fires, or no expert fires.
    """
    layers = {index: layer for index, layer in model.mxd_layers().items() if layer.n_experts}
    for index, n in wanted:
        if index not in layers:
            raise InputError(
                f"--expert {index}:{n}: layer {index} has no experts. Layers with experts: {', '.join(map(str, layers)) or 'none'}."
            )
        if not 0 <= n < layers[index].n_experts:
            raise InputError(
                f"--expert {index}:{n}: layer {index} has no expert {n}. It has experts 0 to {layers[index].n_experts - 1}."
            )
    found: dict[int, list[tuple[Tensor, Tensor]]] = {index: [] for index in layers}
    for start in range(0, len(blocks), _ROWS):
        batch = slice(start, start + _ROWS)
        ids_BT, counted = blocks.take(batch), blocks.counted(batch, mask).flatten()
        with watching(layers) as seen:
            model(input_ids=ids_BT, use_cache=False)
        for index, layer in layers.items():
            values, experts = (coefficients.flatten(0, 1)[counted] for coefficients in sparse(layer.encode(seen[index].inputs)))
            active = values > 0
            found[index].append((values[active].float(), experts[active].int()))
    coefficients = {index: tuple(map(torch.cat, zip(*parts, strict=True))) for index, parts in found.items()}
    if not wanted:
        alive = [(index, int(n)) for index, (_, experts) in coefficients.items() for n in experts.unique()]
        if not alive:
            raise InputError("no expert fires on this text, so none can be steered. Give other text.")
        order = torch.randperm(len(alive), generator=torch.Generator().manual_seed(seed))[:count]
        wanted = sorted(alive[i] for i in order.tolist())
    chosen = []
    for index, n in wanted:
        values = coefficients[index][0][coefficients[index][1] == n]
        if not len(values):
            raise InputError(
                f"--expert {index}:{n}: never fires on this text, so the unit of strength is unknown. Give another expert or text."
            )
        chosen.append(Expert(index, n, len(values), values.quantile(PERCENTILE).item()))
    return chosen


@dataclass(frozen=True)
class SteeringEffect:
    """The measurement of a converted model's experts, with one set of contexts, prompt and seed.

    Both models are in float32 and on one device. contexts: token ids, (B, T); the distribution after the last token is compared.
    prompt: token ids, (T), that every sample begins with. samples: number of samples; new_tokens: length of each.
    """

    model: Any
    base: Any
    contexts: Tensor
    prompt: Tensor
    samples: int
    new_tokens: int
    seed: int

    @cached_property
    def plain(self) -> Tensor:
        """Log-probabilities of the next token after every context without steering, (B, V)."""
        return self._next()

    @cached_property
    def unsteered(self) -> Tensor:
        """Samples without steering, (S, new tokens)."""
        return self._write()

    @cached_property
    def centre(self) -> Tensor:
        """Mean hidden state without steering, (O), from samples other than `unsteered`, whose cosines would be biased by it."""
        return self._states(self._write(1)).mean(0)

    def none(self) -> Effect:
        """Return the effect at strength 0, the reference for all experts. Its layer and expert are -1."""
        return Effect(-1, -1, 0.0, 0.0, 0.0, *self._figures(self.unsteered))

    def of(self, expert: Expert, strength: float) -> Effect:
        """Return the effect of adding `strength` units to an expert's coefficient at every position."""
        amount = strength * expert.unit
        with torch.no_grad(), steer(self.model, expert.layer, expert.number, add=amount):
            steered = self._next()
            written = self._write()
        kl = kl_terms(self.plain, steered).sum(-1).mean().item()
        return Effect(expert.layer, expert.number, strength, amount, kl, *self._figures(written))

    @torch.no_grad()
    def _next(self) -> Tensor:
        """Return log-probabilities of the next token after every context, (B, V)."""
        logits = [self.model(input_ids=ids, use_cache=False).logits[:, -1] for ids in self.contexts.split(_ROWS)]
        return torch.cat(logits).double().log_softmax(-1)

    def _write(self, more: int = 0) -> Tensor:
        """Return samples at temperature 1, (S, new tokens). more: added to the seed."""
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
        return self._perplexity(written), ngram_overlap(written.tolist()), self._similarity(written), written.tolist()

    @torch.no_grad()
    def _perplexity(self, written: Tensor) -> float:
        """Return the base model's perplexity on the tokens written after the prompt."""
        ids = torch.cat([self.prompt[None].expand(len(written), -1), written], 1)
        logits = self.base(input_ids=ids, use_cache=False).logits[:, len(self.prompt) - 1 : -1].double()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), written.flatten())
        return math.exp(min(loss.item(), 700.0))

    @torch.no_grad()
    def _states(self, written: Tensor) -> Tensor:
        """Return the mean of each sample's last hidden states in the base model, (S, O)."""
        states = self.base(input_ids=written, use_cache=False, output_hidden_states=True).hidden_states[-1]
        return states.double().mean(1)

    def _similarity(self, written: Tensor) -> float:
        """Return the mean cosine of two samples' centred mean hidden states; nan for fewer than two samples."""
        states = torch.nn.functional.normalize(self._states(written) - self.centre, dim=-1)
        cosines = states @ states.T
        pairs = ~torch.eye(len(states), dtype=torch.bool)
        return cosines[pairs].mean().item() if pairs.any() else math.nan


def ngram_overlap(samples: Sequence[Sequence[int]], n: int = 2) -> float:
    """Return the mean Jaccard overlap of the n-gram sets of two samples, over all pairs; nan for fewer than two samples."""
    sets = [set(zip(*(sample[i:] for i in range(n)), strict=False)) for sample in samples]
    overlaps = [len(a & b) / max(1, len(a | b)) for a, b in itertools.combinations(sets, 2)]
    return sum(overlaps) / len(overlaps) if overlaps else math.nan


def measure(
    effect: SteeringEffect, experts: Sequence[Expert], strengths: Sequence[float], advance: Callable[[], None]
) -> list[Effect]:
    """Return the effect without steering, then of every expert at every strength. advance: called after each of the latter."""
    found = [effect.none()]
    for expert in experts:
        for strength in strengths:
            found.append(effect.of(expert, strength))
            advance()
    return found
