"""The benchmarks run, at sizes of seconds; what they compare is right. Their figures are for benchmarks/RESULTS.md, not for tests."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import dashboard
import inference
import kill
import steps
import torch
import train_step

SMALL = steps.Shape(24, 40, 24, 200, 4, 64, "gelu_new")


@pytest.mark.parametrize("kind", steps.KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_kind_of_step_runs(monkeypatch, kind, precision):
    make = {"dense": steps.dense, "ours": steps.ours, "floor": steps.floor}[kind]
    step = make(SMALL, torch.device("cpu"), precision)
    step()
    step()


def test_the_dense_step_is_the_same_training(monkeypatch):
    """What we are faster than does what we do: from the same start, the loss falls alike."""
    made = []
    new = steps.new_layer
    monkeypatch.setattr(steps, "new_layer", lambda shape, device: made.append(new(shape, device)) or made[-1])
    for kind in (steps.dense, steps.ours):
        step = kind(SMALL, torch.device("cpu"), "fp32")
        for _ in range(20):
            step()
    theirs, ours = made
    for name in ("encoder.weight", "decoder.weight", "gate.weight", "output_bias"):
        assert torch.allclose(theirs.get_parameter(name), ours.get_parameter(name), atol=1e-5), name
    assert not torch.allclose(new(SMALL, torch.device("cpu")).gate.weight, ours.gate.weight, atol=2e-4)


def test_ratios_are_of_the_medians():
    text = train_step.ratio([4.0, 4.0, 8.0], [2.0, 2.0, 1.0])
    assert text.startswith("2.00 (")


def test_a_killed_run_ends_as_one_left_alone(tmp_path):
    """Two kills at random moments; benchmarks/kill.py does twenty."""
    found = list(kill.kill(2, seed=3, folder=tmp_path, tokens=60_000))
    assert [differing for _, _, differing in found] == [[], []], found
    assert any("step" in stage or "state" in stage or "while" in stage for _, stage, _ in found), found


def test_the_dashboards_benchmark(tmp_path):
    """A small layer: written in a process of its own, whose memory is told."""
    folder = dashboard.checkpoint(tmp_path / "model", width=48, experts=200, k=4, vocabulary=2048)
    written = dashboard.write(folder, tmp_path / "board", 1024)
    assert written.files == 6 + 4 + 4  # pages and assets; summary, tokens, text and index; experts by 64
    assert written.disk_bytes == sum(path.stat().st_size for path in (tmp_path / "board").rglob("*") if path.is_file())
    assert 2**27 < written.peak_bytes < 2**32


def test_the_benchmark_of_inference(tmp_path, capsys):
    """A tiny model: every variant runs in its process; what a token reads is counted by hand."""
    found = inference.measure("tiny", tmp_path, rounds=1, threads=1)
    inference.show("tiny", found)
    table = capsys.readouterr().out
    for title in inference.VARIANTS.values():
        assert f"| {title} |" in table
    width, layers, hidden, vocabulary, experts, k = 32, 2, 128, 300, 64, 4
    attention = 4 * width * width + 4 * width
    norms = 2 * 2 * width
    mlp = 2 * width * hidden + hidden + width
    shared = layers * (attention + norms) + 2 * width + width * vocabulary + width  # the last is one row of positions
    gate_and_linear = width * experts + experts + 2 * width * hidden + hidden + width
    assert found["bytes"]["base"] == 4 * (shared + layers * mlp)
    assert found["bytes"]["dense"] == 4 * (shared + layers * (gate_and_linear + experts * width))
    assert found["bytes"]["mxd"] == found["bytes"]["fp32"] == 4 * (shared + layers * (gate_and_linear + k * width))
    assert found["bytes"]["fp16"] * 2 == found["bytes"]["fp32"]
    assert all(peak > 2**20 for peak in found["peak"].values())
    assert found["peak"]["fp32"] < found["peak"]["mxd"]
