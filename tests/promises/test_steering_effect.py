"""Measured effects of steering equal their definition, and the folder records the settings."""

import csv
import json
import math

import pytest
import torch
from PIL import Image
from project import QUICKSTART

from mxd_convert import InputError, load_checkpoint, steer
from mxd_convert.base_model.load import load_base, load_tokenizer
from mxd_convert.checkpoint.read import base_of
from mxd_convert.data.blocks import prepare_eval
from mxd_convert.evaluation.steering_effect import SteeringEffect, find_experts, ngram_overlap
from mxd_convert.recipe.texts import EvalText


@pytest.fixture(scope="module")
def loaded(converted, text, tmp_path_factory):
    folder = converted["llama"]
    source = EvalText(path=str(text), tokens=1024)
    blocks = prepare_eval(source, 32, load_tokenizer(str(QUICKSTART)), tmp_path_factory.mktemp("blocks"))
    return load_checkpoint(folder, dtype="float32"), load_base(base_of(folder), dtype="float32"), blocks


@torch.no_grad()
def test_the_unit_is_the_99th_percentile_of_active_coefficients(loaded):
    model, _, blocks = loaded
    [expert] = find_experts(model, blocks, [], 1, seed=3)
    layer, fired = model.mxd_layers()[expert.layer], []
    for row in range(len(blocks)):
        ids = blocks.take(slice(row, row + 1))
        seen = []
        handle = layer.expert_acts.register_forward_hook(lambda module, arguments, output, seen=seen: seen.append(output))
        model(input_ids=ids)
        handle.remove()
        values, indices = seen[0]
        for position in range(1, 32):  # the first position does not count
            if ids[0, position] == blocks.bos:
                continue
            fired += [
                v.item() for v, n in zip(values[0, position], indices[0, position], strict=True) if n == expert.number and v > 0
            ]
    assert expert.fires == len(fired) > 0
    assert expert.unit == pytest.approx(torch.tensor(fired).quantile(0.99).item(), rel=1e-5)
    many = find_experts(model, blocks, [], 10, seed=3)
    assert len({(one.layer, one.number) for one in many}) == 10
    assert find_experts(model, blocks, [(one.layer, one.number) for one in many], 1, seed=0) == many


@torch.no_grad()
def test_the_figures_equal_their_definitions(loaded):
    model, base, blocks = loaded
    ids, prompt = blocks.take(slice(0, 20)), torch.tensor([5, 9])
    effect = SteeringEffect(model, base, ids, prompt, samples=4, new_tokens=8, seed=0)
    [expert] = find_experts(model, blocks, [], 1, seed=3)
    found = effect.of(expert, 4.0)
    assert found.coefficient == 4.0 * expert.unit
    plain = model(input_ids=ids).logits[:, -1].log_softmax(-1)
    with steer(model, expert.layer, expert.number, add=found.coefficient):
        steered = model(input_ids=ids).logits[:, -1].log_softmax(-1)
    assert found.kl == pytest.approx((plain.exp() * (plain - steered)).sum(-1).mean().item(), rel=1e-3)
    written = torch.tensor(found.samples)
    assert written.shape == (4, 8)
    whole = torch.cat([prompt[None].expand(4, -1), written], 1)
    labels = whole.clone()
    labels[:, :2] = -100
    assert found.perplexity == pytest.approx(math.exp(base(input_ids=whole, labels=labels).loss.item()), rel=1e-4)
    assert found.ngrams == ngram_overlap(found.samples)
    assert effect.of(expert, 4.0) == found  # seeded
    same = effect.of(expert, 1e-9)  # almost zero: the samples equal the unsteered ones
    plain_figures = effect.none()
    assert same.samples == plain_figures.samples
    assert (same.kl, same.embedding) == pytest.approx((0.0, plain_figures.embedding), abs=1e-6)


def test_the_overlap_of_ngrams_is_exact():
    assert ngram_overlap([[1, 2, 3], [1, 2, 3]]) == 1.0
    assert ngram_overlap([[1, 2, 3], [3, 2, 1]]) == 0.0
    assert ngram_overlap([[1, 2, 3], [1, 2, 4], [5, 6, 7]]) == pytest.approx((1 / 3 + 0 + 0) / 3)
    assert math.isnan(ngram_overlap([[1, 2]]))


def test_the_folder_holds_figures_and_samples(mxd, converted, text, tmp_path):
    folder = tmp_path / "steering"
    arguments = ("--data", text, "--tokens", 512, "--count", 2, "--strengths", "1,4", "--samples", 3, "--new-tokens", 6)
    status, out, err = mxd("measure-steering", converted["gpt2"], *arguments, "--output", folder)
    assert status == 0, err
    assert "not steered" in out
    result = json.loads((folder / "steering.json").read_text())
    assert len(result["effects"]) == 4
    assert result["settings"]["data"]["path"] == text.name
    with (folder / "steering.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["kl"]) for row in rows[1:]] == [effect["kl"] for effect in result["effects"]]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 5 * 3
    with Image.open(folder / "steering.png") as picture:
        assert min(picture.size) > 400


def test_bad_steering_measurements_are_refused(refused, converted, text, tmp_path):
    folder, out = converted["gpt2"], tmp_path / "out"
    with_data = ("measure-steering", folder, "--data", text, "--tokens", 512, "--output", out)
    refused(*with_data, "--expert", "1:0", words=("--expert 1:0", "layer 1 has no experts", "0, 2"))
    refused(*with_data, "--expert", "0:99", words=("--expert 0:99", "experts 0 to 23"))
    refused(*with_data, "--expert", "0", words=("--expert 0", "LAYER:EXPERT"))
    refused(*with_data, "--strengths", "1,x", words=("--strengths 1,x",))
    refused(*with_data, "--strengths", "0", words=("--strengths 0",))
    refused(*with_data, "--samples", 1, words=("--samples 1", "at least 2"))
    refused("measure-steering", folder, "--data", tmp_path / "none.txt", "--output", out, words=("none.txt",))
    assert not out.exists()
    refused("measure-steering", folder, "--data", text, "--output", tmp_path, words=("exists already",))


def test_an_expert_that_never_fires_has_no_unit(loaded):
    model, _, blocks = loaded
    layer = model.mxd_layers()[2]
    bias = layer.gate.bias.clone()
    with torch.no_grad():
        layer.gate.bias[7] = -1e4
    try:
        with pytest.raises(InputError, match="--expert 2:7: never fires"):
            find_experts(model, blocks, [(2, 7)], 1, seed=0)
    finally:
        layer.gate.bias.data.copy_(bias)
