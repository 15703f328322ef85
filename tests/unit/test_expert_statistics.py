"""Statistics of every expert on a text, from one pass in bounded memory, equal explicit loops."""

import errno
import os

import numpy as np
import pytest
import torch
from observations import firings_by_loop
from random_layers import KINDS, gpt2_with_layers
from small_runs import blocks_of

import mxd_convert
from mxd_convert import load_checkpoint, logit_effect
from mxd_convert.base_model.capture import watching
from mxd_convert.base_model.load import load_tokenizer
from mxd_convert.evaluation.experts import examples as expert_examples
from mxd_convert.evaluation.experts import firings
from mxd_convert.evaluation.experts import statistics as expert_statistics
from mxd_convert.evaluation.experts.decomposition import Unembedding, decompose_layer
from mxd_convert.evaluation.experts.effects import EffectsOfLayer, weights
from mxd_convert.evaluation.experts.examples import AFTER, BANDS, BEFORE, BINS, EACH, TOP, examples, figures
from mxd_convert.evaluation.experts.statistics import SAMPLES, collect

ALL_KINDS = [(kind, {}) for kind in KINDS if kind != "dense_twin"] + [
    ("mxd", {"sparsity": "l1"}),
    ("transcoder", {"sparsity": "l1"}),
]


@pytest.mark.parametrize(("kind", "settings"), ALL_KINDS, ids=str)
@pytest.mark.parametrize("mask", ["bos", "none"])
def test_figures_and_contexts_equal_an_explicit_loop(models, text, tmp_path, monkeypatch, kind, settings, mask):
    """The pass uses several batches, pieces and ranges of experts."""
    monkeypatch.setattr(expert_statistics, "_GATES", 40 * 32 * 7)
    monkeypatch.setattr(firings, "_PIECE", 1000)
    model, tokenizer = gpt2_with_layers(models, {1: (kind, settings)}), load_tokenizer(str(models["gpt2"]))
    blocks = blocks_of(text, tokenizer, tmp_path / "text")
    record = collect(model, blocks, tmp_path / "records", mask=mask, quiet=True)[1]
    expected = firings_by_loop(model, 1, blocks, mask)
    assert record.tokens == blocks.counted(slice(None), mask).sum()
    assert 0 < len(expected) <= 24
    ranges = list(record.firings.ranges(16, 3000))
    assert [first for first, _ in ranges] == [0, *(last for _, last in ranges[:-1])]
    assert len(ranges) >= 3
    assert ranges[-1][1] == 40
    for first, last in ranges:
        pairs = record.firings.read(first, last)
        of, shown = figures(pairs), examples(pairs, blocks)
        for n in range(first, last):
            check_figures(of, n - first, expected.get(n, []))
            check_contexts(shown, n - first, expected.get(n, []), blocks)


def check_figures(of, n: int, fired: list[tuple[int, float]]) -> None:
    values = np.array([value for _, value in fired])
    assert of.count[n] == len(values) == of.histogram[n].sum()
    if len(values) == 0:
        assert of.mean[n] == of.largest[n] == of.p99[n] == 0
        return
    assert of.mean[n] == pytest.approx(values.mean(), rel=1e-4)
    assert of.largest[n] == pytest.approx(values.max(), rel=1e-4)
    assert of.p99[n] == pytest.approx(np.quantile(values, 0.99), rel=1e-4)
    expected = np.histogram(values, bins=BINS, range=(0, values.max()))[0]
    assert np.abs(of.histogram[n] - expected).sum() <= 2  # a value at a bin's very edge


def check_contexts(shown, n: int, fired: list[tuple[int, float]], blocks) -> None:
    value_at, context = dict(fired), blocks.context
    ids = blocks.ids.reshape(-1)
    top, seen_blocks, seen_texts = [], set(), set()
    for position, _ in sorted(fired, key=lambda pair: -pair[1]):
        block, start = position // context, max(position // context * context, position - 7)
        recent = tuple(ids[start : position + 1].tolist())
        if block in seen_blocks:
            continue
        seen_blocks.add(block)
        if recent not in seen_texts:
            top.append(position)
        seen_texts.add(recent)
    found = [position for position in shown.top[n].tolist() if position >= 0]
    assert [value_at[position] for position in found] == pytest.approx([value_at[position] for position in top[:TOP]], rel=1e-4)
    ranked = sorted(value_at.values())
    for band in range(BANDS):
        rows = [position for position in shown.bands[n, band].tolist() if position >= 0]
        low, high = -(-band * len(ranked) // BANDS), -(-(band + 1) * len(ranked) // BANDS)
        assert len(rows) == len(set(rows)) == min(EACH, high - low)
        if rows:
            assert shown.bounds[n, band].tolist() == pytest.approx([ranked[low], ranked[high - 1]], rel=1e-4)
        for position in rows:
            assert ranked[low] * 0.9999 <= value_at[position] <= ranked[high - 1] * 1.0001
    for positions, heat in ((shown.top[n], shown.top_heat[n]), (shown.bands[n], shown.bands_heat[n])):
        for position, row in zip(positions.ravel().tolist(), heat.reshape(-1, BEFORE + 1 + AFTER).tolist(), strict=True):
            for offset, value in enumerate(row, -BEFORE):
                at = position + offset
                there = position >= 0 and at // context == position // context
                assert value == pytest.approx(value_at.get(at, 0.0) if there else 0.0, rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_promoted_tokens_follow_logit_effect(converted, text, tmp_path, family):
    """Mean and spread agree for every expert; frequent experts have the spread of a sample."""
    model, tokenizer = load_checkpoint(converted[family], dtype="float32"), load_tokenizer(str(converted[family]))
    blocks = blocks_of(text, tokenizer, tmp_path / "text", tokens=320)
    records = collect(model, blocks, tmp_path / "records", mask="none", quiet=True)
    assert set(records) == {0, 2}
    whole = blocks.take(slice(None))
    exact = 0
    for index, record in records.items():
        up, down = EffectsOfLayer(index, record, Unembedding.of(model), 2048).of(4, 20)
        for n in range(4, 20):
            effect = logit_effect(model, index, n, whole)
            assert record.firings.count_N[n] == effect.tokens
            if effect.tokens == 0:
                continue
            scale = effect.mean.abs().max().item()
            for found, signed in ((up, effect.mean), (down, -effect.mean)):
                ids = found.tokens[n - 4].tolist()
                assert np.abs(found.mean[n - 4] - effect.mean[ids].numpy()).max() < 1e-4 * scale
                assert signed[ids].tolist() == pytest.approx(signed.topk(10).values.tolist(), abs=1e-4 * scale)
                if 1 < effect.tokens <= SAMPLES:
                    exact += 1
                    assert np.abs(found.spread[n - 4] - effect.spread[ids].numpy()).max() < 0.02 * scale
                else:
                    assert (found.spread[n - 4] < 8 * effect.spread[ids].numpy() + 0.02 * scale).all()
    assert exact


@torch.no_grad()
def test_samples_are_the_same_firings_for_any_batch_size(models, text, tmp_path, monkeypatch):
    """Each stored vector is a_n u s of a token where the expert fires; other batch sizes store the same ones."""
    model, tokenizer = gpt2_with_layers(models, {1: ("mxd", {})}), load_tokenizer(str(models["gpt2"]))
    layer, blocks = model.mxd_layers()[1], blocks_of(text, tokenizer, tmp_path / "text")
    other = collect(model, blocks, tmp_path / "other", quiet=True)[1]
    monkeypatch.setattr(expert_statistics, "_GATES", 40 * 32 * 3)
    one = collect(model, blocks, tmp_path / "one", quiet=True)[1]
    assert np.array_equal(np.sort(one.keys_NS), np.sort(other.keys_NS))
    ids = blocks.take(slice(None))
    with watching({1: layer}) as seen, Unembedding.of(model).scales() as scales:
        model(input_ids=ids)
    counted = blocks.counted(slice(None), mask="bos")
    parts, scaled = (
        decompose_layer(layer, seen[1].inputs[counted]),
        layer.linear(seen[1].inputs[counted]) * scales.of(1)[counted].unsqueeze(-1),
    )
    for n in range(40):
        fires = (parts.experts == n) & (parts.values > 0)
        expected = (parts.values * fires).sum(-1, keepdim=True)[fires.any(-1)] * scaled[fires.any(-1)]
        drawn = int(one.drawn_N[n])
        assert drawn == min(SAMPLES, len(expected))
        if drawn == 0:
            continue
        distance = torch.cdist(one.samples_NSO[n, :drawn].float(), expected)
        assert (distance.min(-1).values < 0.01 * expected.norm(dim=-1).max()).all()
        assert torch.allclose(one.written_NO[n], expected.sum(0), atol=1e-3 * expected.abs().sum(0).max().item())


def test_ranks_and_norms_equal_those_of_the_weights(models):
    model = gpt2_with_layers(models, {1: ("mxd", {}), 2: ("transcoder", {})})
    layer = model.mxd_layers()[1]
    with torch.no_grad():
        layer.experts[3, :5] = 0
        layer.experts[4] = 0
    found = weights(layer)
    for n in (2, 3, 4):
        assert found.rank[n] == mxd_convert.expert_rank(layer, n)
        assert found.norm[n] == pytest.approx(layer.expert_weight(n).norm().item(), rel=1e-5, abs=1e-9)
    with torch.no_grad():
        layer.decoder.weight[:, 20:] = 0  # no longer of full rank
    assert weights(layer).rank[[2, 3, 4]].tolist() == [mxd_convert.expert_rank(layer, n) for n in (2, 3, 4)] == [20, 20, 0]
    assert weights(model.mxd_layers()[2]) is None


def test_hashes_are_uniform():
    """The draw of examples depends on it: bits of neighbouring numbers are fair."""
    bits = np.unpackbits(firings.mixed(np.arange(4096), seed=3).view(np.uint8)).reshape(4096, 64).mean(0)
    assert np.abs(bits - 0.5).max() < 0.05
    assert expert_examples.rank_within(np.array([2, 2, 5, 5, 5, 0])).tolist() == [0, 1, 0, 1, 2, 0]


@pytest.mark.parametrize("code", [None, errno.EOPNOTSUPP])
def test_disk_space_is_reserved_before_a_file_is_mapped(code, tmp_path, monkeypatch):
    """A full disk is then an OSError; in a sparse file it would be a signal that ends the process."""

    def failing(*_):
        raise OSError(code, os.strerror(code))

    if code is not None:  # a file system that can't reserve
        monkeypatch.setattr(firings.os, "posix_fallocate", failing)
    size = 3 * 2**20 + 5
    firings.reserve(tmp_path / "zeros", size)
    assert (tmp_path / "zeros").read_bytes() == bytes(size)
    assert (tmp_path / "zeros").stat().st_blocks * 512 >= size
    code = errno.ENOSPC
    monkeypatch.setattr(firings.os, "posix_fallocate", failing)
    with pytest.raises(OSError, match="No space left"):
        firings.reserve(tmp_path / "full", size)
