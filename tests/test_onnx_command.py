"""`export-onnx` as a command, its gate, bad input, the recipe's key, and what runs without PyTorch."""

import json
import shutil
import subprocess
import sys

import onnx_ir as ir
import pytest
import torch
from conftest import ROOT, small_recipe
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import mxd_convert
from mxd_convert.checkpoint import belonging, load_checkpoint
from mxd_convert.errors import InputError
from mxd_convert.onnx import OnnxModel, export, export_onnx, parity

TEXT = "Document 3. The value 41 is returned when index 7 is given."


@pytest.fixture(scope="module")
def exported(converted, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "llama"
    assert export_onnx(converted["llama"], folder, steering=True, data=text, tokens=512, quiet=True).output == folder
    return folder


def nothing_left(folder):
    """Nothing half-written."""
    return not folder.exists() and [file for file in folder.parent.iterdir() if file.name.startswith(f".{folder.name}")] == []


# --- the folder -----------------------------------------------------------------------------------------------------------------


def test_the_folder_is_ready_for_its_clients(exported, converted):
    assert sorted(file.name for file in exported.iterdir()) == sorted(
        [
            *("config.json", "generation_config.json", "genai_config.json"),
            *("onnx", "onnx_report.json", "README.md", "tokenizer.json", "tokenizer_config.json"),
        ]
    )
    config = AutoConfig.from_pretrained(exported)
    assert config.model_type == "llama"
    assert config.architectures == ["LlamaForCausalLM"]
    assert "mxd" not in (exported / "config.json").read_text()
    with pytest.raises(OSError, match="no file named"):  # there are no weights that plain transformers could take for the model's
        AutoModelForCausalLM.from_pretrained(exported)
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (exported, converted["llama"]))
    assert ours(TEXT)["input_ids"] == theirs(TEXT)["input_ids"] == OnnxModel.from_pretrained(exported).tokens(TEXT)
    genai = json.loads((exported / "genai_config.json").read_text())["model"]
    assert genai["decoder"]["filename"] == "onnx/model.onnx"
    assert (genai["decoder"]["num_hidden_layers"], genai["decoder"]["num_key_value_heads"], genai["decoder"]["head_size"]) == (
        3,
        2,
        8,
    )


def test_the_chat_template_goes_with_it(converted, text, tmp_path):
    folder = shutil.copytree(converted["llama"], tmp_path / "copy")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    tokenizer.save_pretrained(folder)
    export_onnx(folder, tmp_path / "out", data=text, tokens=512, quiet=True)
    messages = [{"role": "user", "content": "hello"}]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(messages, tokenize=False) == "[hello]"


def test_the_report_says_what_was_compared(exported, text):
    report = json.loads((exported / "onnx_report.json").read_text())
    assert report["model_type"] == "llama"
    assert (report["opset"], report["steering"], report["expert_outputs"]) == (20, True, False)
    assert not any(name.startswith("experts.") for name in report["outputs"])
    graph = report["graphs"]["fp32"]
    assert graph["sha256"] == {"onnx/model.onnx": mxd_convert.checkpoint.file_sha256(exported / "onnx" / "model.onnx")}
    figures = graph["parity"]
    assert (figures["batches"], figures["pasts"]) == ([1, 2, 3], [0, 1, 40])
    assert figures["lengths"] == [1, 2, 33, 128]  # the tiny model has no more than 128 positions
    assert figures["tokens"] > 500
    assert figures["expert_agreement"] >= 0.999
    assert figures["greedy"] == {"prompts": 20, "new_tokens": 64, "equal": 20, "explained": 0}
    assert figures["steering"]["moved"] > 0.01
    assert graph["passed"]
    assert report["data"]["path"] == text.name


def test_greedy_text_is_that_of_pytorch(converted, exported):
    model, exported_model = load_checkpoint(converted["llama"]), OnnxModel.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(converted["llama"])
    inputs = tokenizer(TEXT, return_tensors="pt")
    theirs = model.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=0)[0]
    assert exported_model.generate(TEXT, 40) == tokenizer.decode(theirs, skip_special_tokens=True)


def test_sampling_follows_the_softmax(exported):
    exported_model = OnnxModel.from_pretrained(exported)
    ids = exported_model.tokens(TEXT)
    first = exported_model.continuations([ids] * 3, 8, temperature=1.0, seed=1)
    assert first == exported_model.continuations([ids] * 3, 8, temperature=1.0, seed=1)
    assert first != exported_model.continuations([ids] * 3, 8, temperature=1.0, seed=2)
    assert len({tuple(row) for row in first}) > 1
    assert exported_model.continuations([ids], 8, temperature=1e-6) == exported_model.continuations([ids], 8)


def test_generation_ends_at_the_end_token(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "copy")
    exported_model = OnnxModel.from_pretrained(folder)
    ids = exported_model.tokens(TEXT)
    written = exported_model.continuations([ids], 20)[0]
    config = json.loads((folder / "generation_config.json").read_text())
    config["eos_token_id"] = [written[5], 2047]
    (folder / "generation_config.json").write_text(json.dumps(config))
    shorter = OnnxModel.from_pretrained(folder).continuations([ids, ids[:3]], 20)
    assert shorter[0] == written[: written.index(written[5]) + 1]


def test_it_runs_where_there_is_no_torch(exported):
    """In a process in which neither torch nor transformers can be imported; the result is this process's."""
    script = f"""
import sys
for name in ("torch", "transformers", "accelerate", "datasets", "onnx", "onnxscript"):
    sys.modules[name] = None
from mxd_convert.onnx import OnnxModel
model = OnnxModel.from_pretrained({str(exported)!r})
print(model.generate({TEXT!r}, 16, steering=[{{"layer": 2, "expert": 3, "add": 2.0}}]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    here = OnnxModel.from_pretrained(exported).generate(TEXT, 16, steering=[{"layer": 2, "expert": 3, "add": 2.0}])
    assert done.stdout == f"{here}\n"


# --- the gate -------------------------------------------------------------------------------------------------------------------


def spoilt(monkeypatch, change):
    """Every graph that is built has something wrong with it."""
    build = export.build_graph

    def build_and_spoil(*arguments):
        built = build(*arguments)
        change(built)
        return built

    monkeypatch.setattr(export, "build_graph", build_and_spoil)


def _other_rows(model: ir.Model) -> None:
    value = next(value for name, value in model.graph.initializers.items() if name.endswith("mlp.experts"))
    value.const_value = ir.tensor(value.const_value.numpy() * 1.01, name=value.name)


def _other_experts(model: ir.Model) -> None:
    value = next(value for name, value in model.graph.initializers.items() if name.endswith("gate.bias"))
    value.const_value = ir.tensor(value.const_value.numpy()[::-1].copy(), name=value.name)


@pytest.mark.parametrize(("change", "words"), [(_other_rows, "largest difference"), (_other_experts, "expert agreement")])
def test_a_graph_that_does_something_else_is_not_written(converted, text, tmp_path, mxd, monkeypatch, change, words):
    spoilt(monkeypatch, change)
    status, out, err = mxd("export-onnx", converted["gpt2"], tmp_path / "out", "--data", text, "--tokens", 512)
    assert status == 1
    assert "out of tolerance: fp32" in err
    assert words in err
    assert "was not written" in err
    assert "largest difference" in out  # the figures are shown all the same
    assert nothing_left(tmp_path / "out")


def test_figures_of_a_refused_graph_are_in_the_json(converted, text, tmp_path, mxd, monkeypatch):
    spoilt(monkeypatch, _other_rows)
    status, out, _ = mxd("export-onnx", converted["gpt2"], tmp_path / "out", "--data", text, "--tokens", 512, "--json")
    found = json.loads(out)
    assert status == 1
    assert found["output"] is None
    assert found["failures"]
    assert not found["graphs"]["fp32"]["passed"]


def test_what_the_gate_measures():
    """Against figures worked out by hand: padding does not count, and a token with other experts takes those after it along."""
    import numpy as np

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
    assert found["expert_overlap"] == pytest.approx(2.5 / 3)
    p = np.exp(theirs[0, 1:]) / np.exp(theirs[0, 1:]).sum(-1, keepdims=True)
    q = np.exp(ours[0, 1:]) / np.exp(ours[0, 1:]).sum(-1, keepdims=True)
    assert found["kl"] == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-6)


def test_overlap_of_experts():
    import numpy as np

    ours = (np.array([[2.0, 1.0, 0.0]]), np.array([[4, 7, 1]]))
    for values, indices, share in (
        ([1.0, 2.0, 0.0], [7, 4, 9], 1.0),  # in any order; what is not positive is not active
        ([2.0, 1.0, 0.5], [4, 7, 1], 2 / 3),
        ([1.0, 1.0, 1.0], [1, 2, 3], 0.0),
    ):
        assert parity.overlap_of(ours, (torch.tensor([values]), torch.tensor([indices]))) == pytest.approx([share])
    assert parity.overlap_of(np.array([[1.0, 0.0, 1e-7]]), torch.tensor([[1.0, 0.0, 0.0]])) == [1.0]
    assert parity.overlap_of(np.array([[1.0, 0.0, 0.1]]), torch.tensor([[1.0, 0.0, 0.0]])) == [0.5]


# --- bad input ------------------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_in_a_line(refused, converted, models, text, tmp_path, monkeypatch):
    checkpoint, out = converted["gpt2"], tmp_path / "out"
    refused("export-onnx", tmp_path / "none", out, words=("none", "no such folder"))
    refused("export-onnx", models["gpt2"], out, words=("'gpt2' model", "mxd-convert run"))
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
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    refused("export-onnx", checkpoint, out, "--data", text, words=("GiB left", "choose another folder"))
    assert nothing_left(out)


def test_a_full_disk_leaves_nothing(refused, converted, text, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.ir, "save", full)
    refused("export-onnx", converted["gpt2"], tmp_path / "out", "--data", text, words=("no space left",))
    assert nothing_left(tmp_path / "out")


def test_a_preset_that_a_graph_can_not_follow_is_refused(refused, copy, text, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    config["mxd"]["steering"] = [{"layer": 0, "expert": 2, "add": 1.0, "positions": "prompt"}]
    (copy / "config.json").write_text(json.dumps(config))
    refused("export-onnx", copy, tmp_path / "out", "--data", text, words=("expert 2", "prompt", "--steering"))


def test_a_model_that_the_exporter_can_not_trace_is_refused(refused, converted, text, tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("a long story\nof which this is the end")

    monkeypatch.setattr(export, "build_graph", fail)
    refused("export-onnx", converted["gpt2"], tmp_path / "out", "--data", text, words=("a gpt2 model", "this is the end"))
    assert nothing_left(tmp_path / "out")


def test_the_runtime_says_what_is_wrong(exported, converted, tmp_path):
    exported_model = OnnxModel.from_pretrained(exported)
    for act, words in (
        (lambda: OnnxModel.from_pretrained(converted["llama"]), "no onnx/model.onnx"),
        (lambda: OnnxModel.from_pretrained(exported, dtype="fp16"), "no graph in fp16; there is fp32"),
        (lambda: exported_model.encode(TEXT), "--expert-outputs"),
        (lambda: exported_model.generate(TEXT, 1000), "more than the model's 128"),
        (lambda: exported_model.continuations([[]]), "a prompt is empty"),
        (lambda: exported_model.generate(TEXT, 2, steering=[{"layer": 1, "expert": 0, "add": 1.0}]), "layer 1 is not converted"),
        (lambda: exported_model.generate(TEXT, 2, steering=[{"layer": 0, "expert": 24, "add": 1.0}]), "no expert 24"),
        (lambda: exported_model.generate(TEXT, 2, steering=[{"layer": 0, "expert": 1, "scale": 1.0}]), "only add"),
    ):
        with pytest.raises(InputError, match=words):
            act()
    damaged = shutil.copytree(exported, tmp_path / "damaged")
    (damaged / "onnx" / "model.onnx").write_bytes((exported / "onnx" / "model.onnx").read_bytes()[:1000])
    with pytest.raises(InputError, match="can't load it"):
        OnnxModel.from_pretrained(damaged)


def test_without_steering_inputs_steering_is_refused(converted, text, tmp_path):
    export_onnx(converted["gpt2"], tmp_path / "out", data=text, tokens=512, quiet=True)
    with pytest.raises(InputError, match="export it with --steering"):
        OnnxModel.from_pretrained(tmp_path / "out").generate(TEXT, 2, steering=[{"layer": 0, "expert": 1, "add": 1.0}])


# --- text, recipe ---------------------------------------------------------------------------------------------------------------


def test_without_data_it_is_compared_on_what_was_held_out(converted, tmp_path, text, monkeypatch):
    done = export_onnx(converted["gpt_neox"], tmp_path / "out", tokens=256, quiet=True)
    assert done.report["data"]["path"] == text.name
    assert done.report["data"]["held_out"] is True
    folder = shutil.copytree(converted["gpt_neox"], tmp_path / "copy")
    (folder / "mxd_local.json").unlink()
    done = export_onnx(folder, tmp_path / "other", tokens=256, quiet=True)
    assert done.report["data"]["path"] == "python-docs.jsonl.gz"


def test_a_recipe_exports(models, text, tmp_path, mxd, monkeypatch):
    import yaml

    path = tmp_path / "recipe.yaml"
    content = small_recipe(models["gpt2"], text, tmp_path / "run", layers=[1], output={"onnx": True})
    path.write_text(yaml.safe_dump(content))
    spoil = monkeypatch.context()
    with spoil as patch:
        spoilt(patch, _other_rows)
        status, _, err = mxd("run", path)
        assert status == 1
        assert "ONNX export, out of tolerance" in err
        assert (tmp_path / "run" / "mxd_report.json").is_file()
        assert not (tmp_path / "run" / "onnx").exists()
    status, _, err = mxd("run", path)  # the checkpoint is finished; the export is made up for
    assert status == 0, err
    assert OnnxModel.from_pretrained(tmp_path / "run" / "onnx").generate(TEXT, 4)
    assert not any(name.startswith("onnx") for name in belonging(tmp_path / "run"))  # a model of its own
    assert mxd_convert.verify_provenance(tmp_path / "run").ok
