"""`export-onnx` and `OnnxModel` refuse bad input in one line that names it, and leave no files."""

import json
import shutil

import numpy as np
import pytest
from folders import nothing_left
from safetensors.numpy import load_file, save_file
from small_runs import TEXT

from mxd_convert.commands import export_onnx as export
from mxd_convert.commands.export_onnx import export_onnx
from mxd_convert.errors import InputError
from mxd_convert.onnx import OnnxModel


@pytest.fixture
def llama(exported):
    """Return the Llama's export with experts and steering."""
    return exported["llama"]


def test_bad_input_is_a_one_line_error(refused, converted, models, text, tmp_path, monkeypatch):
    checkpoint, out = converted["gpt2"], tmp_path / "out"
    refused("export-onnx", tmp_path / "none", out, words=("none", "no such folder"))
    refused("export-onnx", models["gpt2"], out, words=("'gpt2' model", "mxd-convert run"))
    bare = tmp_path / "bare"
    bare.mkdir()
    config = json.loads((checkpoint / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "mxd"}))
    refused("export-onnx", bare, out, words=("mxd is None",))
    (bare / "config.json").write_text(json.dumps({**config, "architectures": ["MxdNobodyForCausalLM"]}))
    refused("export-onnx", bare, out, words=("no NobodyConfig",))
    refused("export-onnx", checkpoint, out, "--opset", 11, words=("--opset 11", "too old", "18"))
    refused("export-onnx", checkpoint, out, "--opset", 99, words=("--opset 99", "20"))
    refused("export-onnx", checkpoint, out, "--dtype", "int4", words=("--dtype int4", "fp16"))
    refused("export-onnx", checkpoint, out, "--dtype", "fp32,fp32", words=("--dtype",))
    refused("export-onnx", checkpoint, out, "--quantize", "int4", words=("--quantize int4", "int8"))
    refused("export-onnx", checkpoint, out, "--data", tmp_path / "none.txt", words=("none.txt",))
    refused("export-onnx", checkpoint, out, "--data", text, "--tokens", 3, words=("--tokens 3",))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    refused("export-onnx", checkpoint, tmp_path / "full", words=("exists already",))
    refused("export-onnx", checkpoint, checkpoint / "inside", words=("inside the checkpoint",))
    refused("export-onnx", checkpoint, tmp_path / "full" / "mine" / "out", "--data", text, words=("mine",))
    refused("export-onnx", checkpoint, "/proc/nowhere/out", "--data", text, words=("/proc/nowhere",))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    refused("export-onnx", checkpoint, out, "--data", text, words=("of disk space", "choose another folder"))
    assert nothing_left(out)


def test_a_full_disk_leaves_no_files(refused, converted, text, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.ir, "save", full)
    refused("export-onnx", converted["gpt2"], tmp_path / "out", "--data", text, words=("no space left", "choose another folder"))
    assert nothing_left(tmp_path / "out")


def test_weights_beyond_half_precision_are_named(refused, copy, text, tmp_path):
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if name.endswith("experts"))
    weights[name][3] = 1e5
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    refused("export-onnx", copy, tmp_path / "out", "--data", text, "--dtype", "fp16", words=(name, "65,504", "--dtype fp32"))
    assert nothing_left(tmp_path / "out")


def test_settings_that_no_runtime_understands_are_refused_first(refused, copy, text, tmp_path):
    settings = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": -1}))
    refused("export-onnx", copy, tmp_path / "out", "--data", text, words=("generation_config.json", "eos_token_id is -1"))
    assert nothing_left(tmp_path / "out")


def test_a_preset_that_a_graph_can_not_follow_is_refused(refused, copy, text, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    config["mxd"]["steering"] = [{"layer": 0, "expert": 2, "add": 1.0, "positions": "prompt"}]
    (copy / "config.json").write_text(json.dumps(config))
    refused("export-onnx", copy, tmp_path / "out", "--data", text, words=("expert 2", "prompt", "--steering"))


def test_a_model_that_the_exporter_can_not_trace_is_refused(refused, copy, text, tmp_path, monkeypatch):
    """Its positions depend on the length of the text. The error names the cause if it is known, and quotes PyTorch otherwise."""
    config = json.loads((copy / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (copy / "config.json").write_text(json.dumps(config))
    refused("export-onnx", copy, tmp_path / "out", "--data", text, words=("rope_type 'dynamic'", "no ONNX export"))
    monkeypatch.setattr(export, "_length_dependent", lambda config: None)
    refused(
        "export-onnx", copy, tmp_path / "out", "--data", text, words=("PyTorch can't export this llama model", "data-dependent")
    )
    assert nothing_left(tmp_path / "out")


def test_running_out_of_memory_in_onnxruntime_is_a_one_line_error(refused, converted, text, tmp_path, monkeypatch):
    class Full:
        def __init__(self, session):
            self.session = session

        def __getattr__(self, name):
            return getattr(self.session, name)

        def run_with_ort_values(self, *arguments):
            raise Exception("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 1")

    load = OnnxModel.from_graph

    def loaded(*arguments, **options):
        model = load(*arguments, **options)
        model.session = Full(model.session)
        return model

    monkeypatch.setattr(OnnxModel, "from_graph", loaded)
    refused("export-onnx", converted["gpt2"], tmp_path / "out", "--data", text, words=("out of memory while exporting",))
    assert nothing_left(tmp_path / "out")


def test_the_runtime_names_every_mistake(llama, converted, tmp_path):
    exported_model = OnnxModel.from_pretrained(llama)

    def steered(**changes):
        return exported_model.generate(TEXT, 1, steering=[{"layer": 0, "expert": 1, "add": 1.0, **changes}])

    for act, words in (
        (lambda: OnnxModel.from_pretrained(converted["llama"]), "no onnx/model.onnx"),
        (lambda: OnnxModel.from_pretrained(llama, dtype="fp16"), "no graph in fp16. Available: fp32"),
        (lambda: exported_model.encode(""), "the text is empty"),
        (lambda: exported_model.generate(TEXT, 1000), "more than the model's 128"),
        (lambda: exported_model.continuations([[]]), "a prompt is empty"),
        (lambda: exported_model.generate(TEXT, 2, steering=[{"layer": 1, "expert": 0, "add": 1.0}]), "layer 1 is not converted"),
        (lambda: exported_model.generate(TEXT, 2, steering=[{"layer": 0, "expert": 24, "add": 1.0}]), "no expert 24"),
        (lambda: exported_model.continuations([[2048]]), "token id 2048: outside of the vocabulary, 0 to 2047"),
        (lambda: steered(positions="promt"), "'promt'"),
        (lambda: steered(scale=0.0), "Give exactly one of add"),
        (lambda: steered(add=float("nan")), "add is nan"),
        (lambda: steered(expert=True), "no expert True"),
        (lambda: steered(expert=99, positions="generation"), "no expert 99"),
        (lambda: exported_model.generate(TEXT, 2, steering=[{"layer": 0, "expert": 1, "scale": 1.0}]), "only add"),
    ):
        with pytest.raises(InputError, match=words):
            act()
    damaged = shutil.copytree(llama, tmp_path / "damaged")
    (damaged / "onnx" / "model.onnx").write_bytes((llama / "onnx" / "model.onnx").read_bytes()[:1000])
    with pytest.raises(InputError, match="not a readable ONNX graph"):
        OnnxModel.from_pretrained(damaged)


def test_numpy_numbers_are_accepted_and_a_refusal_changes_nothing(llama):
    exported_model = OnnxModel.from_pretrained(llama)
    order = {"layer": 2, "expert": 3, "add": 2.0}
    numpys = {"layer": np.int64(2), "expert": np.int64(3), "add": np.float32(2.0)}
    assert exported_model.generate(TEXT, 8, steering=[numpys]) == exported_model.generate(TEXT, 8, steering=[order])
    ids, cache = np.array([exported_model.tokens(TEXT)]), exported_model.empty_cache(1)
    with pytest.raises(InputError):
        exported_model.step(ids, cache, steering=[{**order, "expert": 99}])
    expected = exported_model.step(ids, exported_model.empty_cache(1)).logits
    assert np.array_equal(exported_model.step(ids, cache).logits, expected)


def test_outputs_that_were_not_exported_are_refused(converted, text, tmp_path):
    done = export_onnx(converted["gpt2"], tmp_path / "out", data=text, tokens=512, quiet=True)
    assert not any(name.startswith(("experts.", "steering.")) for name in done.report["inputs"] + done.report["outputs"])
    with pytest.raises(InputError, match="--expert-outputs"):
        OnnxModel.from_pretrained(tmp_path / "out").encode(TEXT)
    with pytest.raises(InputError, match="Export it with --steering"):
        OnnxModel.from_pretrained(tmp_path / "out").generate(TEXT, 2, steering=[{"layer": 0, "expert": 1, "add": 1.0}])
