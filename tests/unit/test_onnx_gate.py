"""The gate of `export-onnx` measures the right figures, and a wrong graph is not written."""

import json
import shutil

import numpy as np
import onnx_ir as ir
import pytest
import torch
from folders import nothing_left
from onnx_exports import other_rows, spoilt

from mxd_convert.commands.export_onnx import export_onnx
from mxd_convert.onnx import OnnxModel, graph, parity


@pytest.mark.parametrize("spoil", ["ignored", "negated", "another expert"])
@pytest.mark.parametrize("family", ["llama"])
def test_wrong_steering_is_found(converted, text, tmp_path, monkeypatch, family, spoil):
    right = graph._Wrapper.forward

    def wrong(self, input_ids, attention_mask, position_ids=None, past=(), steering=None):
        layers, experts, amounts = steering
        changed = {
            "ignored": (layers, experts, amounts * 0),
            "negated": (layers, experts, -amounts),
            "another expert": (layers, (experts + 1) % 24, amounts),
        }[spoil]
        return right(self, input_ids, attention_mask, position_ids, past, changed)

    monkeypatch.setattr(graph._Wrapper, "forward", wrong)
    done = export_onnx(converted[family], tmp_path / "out", steering=True, data=text, tokens=512, quiet=True)
    assert done.output is None
    assert any("steer" in line for line in done.failures), done.failures
    assert not any("steer" not in line for line in done.failures)  # every other check passes
    assert nothing_left(tmp_path / "out")


def other_experts(built: ir.Model) -> None:
    """Change the gates, so that other experts fire."""
    value = next(value for name, value in built.graph.initializers.items() if name.endswith("gate.bias"))
    value.const_value = ir.tensor(value.const_value.numpy()[::-1].copy(), name=value.name)


def endless_rows(built: ir.Model) -> None:
    """Change the experts, so that their rows overflow."""
    value = next(value for name, value in built.graph.initializers.items() if name.endswith("mlp.experts"))
    value.const_value = ir.tensor(np.full_like(value.const_value.numpy(), 3e38), name=value.name)


@pytest.mark.parametrize(
    ("change", "words"),
    [(other_rows, "largest difference"), (other_experts, "expert overlap"), (endless_rows, "logits that are not finite")],
)
def test_a_wrong_graph_is_not_written(converted, text, tmp_path, mxd, monkeypatch, change, words):
    spoilt(monkeypatch, change)
    status, out, err = mxd("export-onnx", converted["gpt2"], tmp_path / "out", "--data", text, "--tokens", 512)
    assert status == 1
    assert "out of tolerance: fp32" in err
    assert words in err
    assert "was not written" in err
    assert "largest difference" in out  # the figures are printed too
    assert nothing_left(tmp_path / "out")


def test_the_json_holds_the_figures_of_a_refused_graph(converted, text, tmp_path, mxd, monkeypatch):
    spoilt(monkeypatch, other_rows)
    status, out, _ = mxd("export-onnx", converted["gpt2"], tmp_path / "out", "--data", text, "--tokens", 512, "--json")
    found = json.loads(out)
    assert status == 1
    assert found["output"] is None
    assert found["failures"]
    assert not found["graphs"]["fp32"]["passed"]


def test_the_gate_measures_figures_worked_out_by_hand():
    """Padding does not count, and a token with other experts excuses the tokens after it."""
    sums = parity.Comparison()
    ours, theirs = np.zeros((1, 4, 3), dtype=np.float32), np.zeros((1, 4, 3), dtype=np.float32)
    theirs[0, 1, 0], ours[0, 1, 0] = 1.0, 1.5  # agrees
    theirs[0, 2, 1], ours[0, 2, 2] = 1.0, 1.0  # another expert
    ours[0, 3, 0] = 4.0  # agrees, after one that does not
    ours[0, 0, 0] = 99.0  # padding
    sums.add(ours, theirs, np.array([[1.0, 1.0, 0.5, 1.0]]), np.array([[0, 1, 1, 1]]))
    found = sums.figures()
    assert found["tokens"] == 3
    assert found["largest_difference"] == 0.5
    assert found["largest_difference_all"] == 4.0
    assert found["argmax_agreement"] == pytest.approx(2 / 3)
    assert found["expert_agreement"] == pytest.approx(2 / 3)
    assert found["expert_flips"] == 1
    assert found["expert_overlap"] == pytest.approx(2.5 / 3)
    p = np.exp(theirs[0, 1:]) / np.exp(theirs[0, 1:]).sum(-1, keepdims=True)
    q = np.exp(ours[0, 1:]) / np.exp(ours[0, 1:]).sum(-1, keepdims=True)
    assert found["kl"] == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-6)


def test_nan_and_infinity_do_not_pass():
    sums = parity.Comparison()
    theirs = np.random.default_rng(0).standard_normal((1, 1000, 5)).astype(np.float32)
    ours = theirs.copy()
    ours[0, 500] = np.nan
    sums.add(ours, theirs, np.ones((1, 1000)), np.ones((1, 1000)))
    for dtype in ("fp32", "fp16", "int8"):
        found = parity.failures(dtype, {**sums.figures(), "delta_ce": 0.0})
        assert any("1 of 1000 tokens have logits that are not finite" in line for line in found), found
    sums = parity.Comparison()
    sums.add(theirs, theirs, np.ones((1, 1000)), np.ones((1, 1000)))
    assert parity.failures("fp32", {**sums.figures(), "delta_ce": 0.0}) == []
    assert parity.failures("fp32", {**sums.figures(), "delta_ce": float("nan")}) != []


def test_generation_settings_do_not_affect_the_gate(converted, text, tmp_path):
    """The gate compares the most likely tokens without the checkpoint's settings; an end token is not needed."""
    folder = shutil.copytree(converted["llama"], tmp_path / "copy")
    settings = {"repetition_penalty": 1.5, "num_beams": 2, "min_new_tokens": 5, "eos_token_id": None, "bos_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    done = export_onnx(folder, tmp_path / "out", data=text, tokens=512, quiet=True)
    assert done.failures == []
    assert done.report["graphs"]["fp32"]["parity"]["greedy"]["equal"] == parity.PROMPTS
    genai = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]
    assert genai["eos_token_id"] == [2048]  # an id that the model can not generate
    assert OnnxModel.from_pretrained(tmp_path / "out").eos == set()


def test_the_overlap_of_experts_ignores_order_and_inactive_experts():
    ours = (np.array([[2.0, 1.0, 0.0]]), np.array([[4, 7, 1]]))
    for values, indices, share in (
        ([1.0, 2.0, 0.0], [7, 4, 9], 1.0),  # order is irrelevant; experts without a positive coefficient are inactive
        ([2.0, 1.0, 0.5], [4, 7, 1], 2 / 3),
        ([1.0, 1.0, 1.0], [1, 2, 3], 0.0),
    ):
        assert parity.overlap_of(ours, (torch.tensor([values]), torch.tensor([indices]))) == pytest.approx([share])
    assert parity.overlap_of(np.array([[1.0, 0.0, 1e-7]]), torch.tensor([[1.0, 0.0, 0.0]])) == [1.0]
    assert parity.overlap_of(np.array([[1.0, 0.0, 0.1]]), torch.tensor([[1.0, 0.0, 0.0]])) == [0.5]
