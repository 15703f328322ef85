"""The data files of a dashboard: scripts that pass JSON to its pages.

Browsers may load scripts from disk, but not fetch JSON.
The files contain only text and numbers; pages insert text as text, never as markup. docs/dashboard.md describes their content.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mxd_convert import files
from mxd_convert.dashboard.tokens import Array, Tokens
from mxd_convert.data.blocks import Blocks
from mxd_convert.evaluation.experts.decomposition import Unembedding
from mxd_convert.evaluation.experts.effects import Effects, EffectsOfLayer, similar, unit_rows, weights
from mxd_convert.evaluation.experts.examples import BEFORE, Examples, Figures, examples, figures
from mxd_convert.evaluation.experts.statistics import LayerRecord
from mxd_convert.evaluation.layer_figures import ALWAYS_ON

SHARD = 64  # experts per data file
TEXT_SHARD = 2**16  # tokens per data file of text
RARE = 1e-4  # firing rate below which an expert is rare
_SNIPPET = (10, 3)  # tokens shown on the index before and after an expert's top token
_STEPS = 4  # bins per decade of the density histogram
_PAIRS = 2**21  # pairs of expert and token in memory at a time
_TOGETHER = 256  # experts whose effects on the whole vocabulary are computed at a time
_OF_SIMILAR = 3  # promoted tokens shown for a similar expert


@dataclass(frozen=True)
class Source:
    """The sources of the pages: the text, the strings of its tokens, and the map from a layer's output to logits."""

    blocks: Blocks
    tokens: Tokens
    unembedding: Unembedding
    vocabulary: int  # number of token ids that the tokenizer knows


def write_data(folder: Path, name: str, content: Any) -> None:
    """Write `name`.js, which passes `content` to the page. It is ASCII without `<`, so no text can close a script element."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    path = folder / f"{name}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, f"MXD.give({json.dumps(name)},{text});\n")


def write_text(folder: Path, blocks: Blocks, tokens: Tokens) -> None:
    """Write the whole text as token numbers, in files of TEXT_SHARD tokens."""
    flat = blocks.ids.reshape(-1)
    for number, start in enumerate(range(0, len(flat), TEXT_SHARD)):
        write_data(folder, f"data/text-{number}", tokens.number(flat[start : start + TEXT_SHARD].astype(np.int64)).tolist())


class LayerPages:
    """The data of one layer's expert pages and of its index."""

    def __init__(self, index: int, record: LayerRecord, source: Source) -> None:
        self.index, self.record, self.source = index, record, source
        self.layer, self.count_N = record.layer, record.firings.count_N
        self.rows: dict[str, list[Any]] = {name: [] for name in ("count", "mean", "largest", "p99", "top")}

    def write(self, folder: Path) -> None:
        """Write the layer's data files."""
        self.unit_NO, self.weights = unit_rows(self.layer), weights(self.layer)
        self.previous_N, self.next_N = _neighbours(self.count_N)
        self._find_effects()
        shard: list[dict[str, Any]] = []
        for first, last in self.record.firings.ranges(SHARD, _PAIRS):
            shard += self._experts(first, last)
            if last % SHARD == 0 or last == len(self.count_N):
                write_data(folder, f"data/{self.index}/experts-{(last - 1) // SHARD}", shard)
                shard = []
        write_data(folder, f"data/{self.index}/index", {**self.rows, "up": self.up_tokens})

    def _find_effects(self) -> None:
        """Compute every expert's promoted and suppressed tokens as [number, mean, spread]; None for experts that never fire."""
        effects = EffectsOfLayer(self.index, self.record, self.source.unembedding, self.source.vocabulary)
        self.effects: list[tuple[list[Any], list[Any]] | None] = []
        for first in range(0, len(self.count_N), _TOGETHER):
            last = min(first + _TOGETHER, len(self.count_N))
            up, down = (self._listed(found) for found in effects.of(first, last))
            fires = (self.count_N[first:last] > 0).tolist()
            self.effects += [pair if there else None for pair, there in zip(zip(up, down, strict=True), fires, strict=True)]
        self.up_tokens = [None if pair is None else [number for number, _, _ in pair[0]] for pair in self.effects]

    def _listed(self, found: Effects) -> list[list[Any]]:
        numbers = self.source.tokens.number(found.tokens).tolist()
        lists = zip(numbers, rounded(found.mean), rounded(found.spread), strict=True)
        return [[list(row) for row in zip(*columns, strict=True)] for columns in lists]

    def _experts(self, first: int, last: int) -> list[dict[str, Any]]:
        pairs = self.record.firings.read(first, last)
        of, shown = figures(pairs), examples(pairs, self.source.blocks)
        columns = {"count": of.count.tolist()} | {name: rounded(getattr(of, name)) for name in ("mean", "largest", "p99")}
        for name, values in columns.items():
            self.rows[name] += values
        self.rows["top"] += self._snippets(shown.top[:, 0])
        like = self._similar(first, last)
        contexts = _contexts(of, shown)
        experts = []
        for row, n in enumerate(range(first, last)):
            expert = {name: values[row] for name, values in columns.items()}
            expert |= {"beside": [int(self.previous_N[n]), int(self.next_N[n])], "like": like[row]}
            if self.weights is not None:
                expert |= {"rank": int(self.weights.rank[n]), "norm": rounded(self.weights.norm[n])}
            effects = self.effects[n]
            if effects is not None:
                expert |= {"up": effects[0], "down": effects[1], **contexts[row]}
            experts.append(expert)
        return experts

    def _similar(self, first: int, last: int) -> list[list[list[Any]]]:
        """Return, for each expert, [number, cosine, some promoted tokens] of the most similar experts."""
        experts, cosines = similar(self.unit_NO, first, last)
        return [
            [
                [m, round(cosine, 3), (self.up_tokens[m] or [])[:_OF_SIMILAR]]
                for m, cosine in zip(*pair, strict=True)
                if cosine > 0
            ]
            for pair in zip(experts.tolist(), cosines.tolist(), strict=True)
        ]

    def _snippets(self, positions: Array) -> list[list[str] | None]:
        """Return the texts before, at and after each position; None for position -1."""
        blocks, tokens = self.source.blocks, self.source.tokens
        found: list[list[str] | None] = []
        for position in positions.tolist():
            if position < 0:
                found.append(None)
                continue
            block, offset = divmod(position, blocks.context)
            start = max(0, offset - _SNIPPET[0])
            row = tokens.number(blocks.ids[block, start : offset + 1 + _SNIPPET[1]].astype(np.int64)).tolist()
            cut = offset - start
            found.append([tokens.text(row[:cut]), tokens.text(row[cut : cut + 1]), tokens.text(row[cut + 1 :])])
        return found

    def about(self) -> dict[str, Any]:
        """Return the layer's entry on the index.

        `density` is a histogram of experts by firing rate, with _STEPS bins per decade from 10 ** `from` up to 1.
        """
        layer, tokens = self.layer, self.record.tokens
        rate_N = self.count_N / tokens
        alive = rate_N[rate_N > 0]
        lowest = min(-1, math.floor(math.log10(1 / tokens)))
        bins = np.minimum(((np.log10(alive) - lowest) * _STEPS + 1e-9).astype(np.int64), -lowest * _STEPS - 1)
        return {
            **about_layer(self.index, layer),
            "tokens": tokens,
            "active": rounded(np.float64(self.count_N.sum() / tokens)),
            **counts(self.count_N, tokens),
            "density": {"from": lowest, "steps": _STEPS, "experts": np.bincount(bins, minlength=-lowest * _STEPS).tolist()},
        }


def about_layer(index: int, layer: Any) -> dict[str, Any]:
    """Return index, kind and sizes of a layer, which needn't have experts."""
    return {
        "layer": index,
        "kind": layer.kind,
        **{key: getattr(layer, key) for key in ("d_in", "d_hidden", "d_out", "n_experts", "k")},
    }


def counts(count_N: Array, tokens: int) -> dict[str, int]:
    """Return the numbers of dead experts, of rare ones (firing rate below RARE), and of always-on ones (above ALWAYS_ON)."""
    rate_N = count_N / tokens
    rare = (rate_N > 0) & (rate_N < RARE)
    return {"dead": int((rate_N == 0).sum()), "rare": int(rare.sum()), "always_on": int((rate_N > ALWAYS_ON).sum())}


def rounded(values: Any) -> Any:
    """Round numbers to four significant digits. Return Python floats, nested like the input."""
    x = np.asarray(values, dtype=np.float64)
    x = np.nan_to_num(x, posinf=1e300, neginf=-1e300)  # JSON has no infinities
    unit = 10.0 ** (3 - np.floor(np.log10(np.maximum(np.abs(x), 1e-290))))
    return (np.round(x * unit) / unit).tolist()


def _contexts(of: Figures, shown: Examples) -> list[dict[str, Any]]:
    """Return histogram, top contexts and bands of each expert.

    A band is [smallest, largest, contexts]. A context is [position, [offset, coefficient, offset, coefficient, ...]].
    """
    top = _with_heat(shown.top, shown.top_heat)
    bands = _with_heat(shown.bands, shown.bands_heat)
    bounds = rounded(shown.bounds)
    return [
        {
            "histogram": histogram,
            "top": top[row],
            "bands": [[*bound, band] for bound, band in zip(bounds[row], bands[row], strict=True) if band],
        }
        for row, histogram in enumerate(of.histogram.tolist())
    ]


def _with_heat(positions: Array, heat: Array) -> list[Any]:
    """Return positions (..., E) as nested lists of contexts.

    Positions of -1 are left out, and so are coefficients of 0 around them; heat is (..., E, BEFORE + 1 + AFTER).
    """
    if positions.ndim > 1:
        return [_with_heat(one, around) for one, around in zip(positions, heat, strict=True)]
    found = []
    values = rounded(heat)
    for position, row in zip(positions.tolist(), values, strict=True):
        if position >= 0:
            found.append([position, [number for offset, value in enumerate(row, -BEFORE) if value for number in (offset, value)]])
    return found


def _neighbours(count_N: Array) -> tuple[Array, Array]:
    """Return the previous and the next expert that fires, (N) each; -1 if none does."""
    index_N = np.arange(len(count_N))
    below_N = np.maximum.accumulate(np.where(count_N > 0, index_N, -1))
    above_N = np.minimum.accumulate(np.where(count_N > 0, index_N, len(count_N))[::-1])[::-1]
    above_N = np.where(above_N == len(count_N), -1, above_N)
    return np.concatenate([[-1], below_N[:-1]]), np.concatenate([above_N[1:], [-1]])
