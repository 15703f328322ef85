"""`export-onnx` writes a complete folder, compares it on a text, follows the recipe, and its result runs without PyTorch."""

import json
import shutil
import subprocess
import sys

import pytest
import yaml
from onnx_exports import other_rows, spoilt
from project import ROOT
from small_runs import TEXT, small_recipe
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import mxd_convert
from mxd_convert.checkpoint.read import belonging, load_checkpoint
from mxd_convert.commands.export_onnx import export_onnx
from mxd_convert.files import file_sha256
from mxd_convert.onnx import OnnxModel


@pytest.fixture
def llama(exported):
    """Return the Llama's export with experts and steering."""
    return exported["llama"]


# --- the folder -----------------------------------------------------------------------------------------------------------------


def test_the_folder_is_ready_for_its_clients(llama, converted):
    assert sorted(file.name for file in llama.iterdir()) == sorted(
        [
            *("config.json", "generation_config.json", "genai_config.json"),
            *("onnx", "onnx_report.json", "README.md", "tokenizer.json", "tokenizer_config.json"),
        ]
    )
    config = AutoConfig.from_pretrained(llama)
    assert config.model_type == "llama"
    assert config.architectures == ["LlamaForCausalLM"]
    assert "mxd" not in (llama / "config.json").read_text()
    with pytest.raises(OSError, match="no file named"):  # no weights that plain transformers could load as the model's
        AutoModelForCausalLM.from_pretrained(llama)
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (llama, converted["llama"]))
    assert ours(TEXT)["input_ids"] == theirs(TEXT)["input_ids"] == OnnxModel.from_pretrained(llama).tokens(TEXT)
    genai = json.loads((llama / "genai_config.json").read_text())["model"]
    assert genai["decoder"]["filename"] == "onnx/model.onnx"
    assert (genai["decoder"]["num_hidden_layers"], genai["decoder"]["num_key_value_heads"], genai["decoder"]["head_size"]) == (
        3,
        2,
        8,
    )


def test_the_chat_template_is_exported(converted, text, tmp_path):
    folder = shutil.copytree(converted["llama"], tmp_path / "copy")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    tokenizer.save_pretrained(folder)
    export_onnx(folder, tmp_path / "out", data=text, tokens=512, quiet=True)
    messages = [{"role": "user", "content": "hello"}]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(messages, tokenize=False) == "[hello]"


def test_the_report_names_the_compared_text(llama, text):
    report = json.loads((llama / "onnx_report.json").read_text())
    assert report["model_type"] == "llama"
    assert (report["opset"], report["steering"], report["expert_outputs"]) == (20, True, True)
    assert "experts.2.values" in report["outputs"]
    graph = report["graphs"]["fp32"]
    assert graph["sha256"] == {"onnx/model.onnx": file_sha256(llama / "onnx" / "model.onnx")}
    figures = graph["parity"]
    assert (figures["batches"], figures["pasts"]) == ([1, 2, 3], [0, 1, 40])
    assert figures["lengths"] == [1, 2, 33, 128]  # the tiny model has no more than 128 positions
    assert figures["tokens"] > 500
    assert figures["expert_agreement"] >= 0.999
    assert figures["greedy"] == {"prompts": 4, "new_tokens": 16, "equal": 4, "explained": 0}  # tests/conftest.py, brief_parity
    assert figures["steering"]["moved"] > 0.01
    assert graph["passed"]
    assert report["data"]["path"] == text.name


def test_greedy_text_equals_that_of_pytorch(converted, llama):
    model, exported_model = load_checkpoint(converted["llama"]), OnnxModel.from_pretrained(llama)
    tokenizer = AutoTokenizer.from_pretrained(converted["llama"])
    inputs = tokenizer(TEXT, return_tensors="pt")
    theirs = model.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=0)[0]
    assert exported_model.generate(TEXT, 40) == tokenizer.decode(theirs, skip_special_tokens=True)


def test_sampling_follows_the_softmax(llama):
    exported_model = OnnxModel.from_pretrained(llama)
    ids = exported_model.tokens(TEXT)
    first = exported_model.continuations([ids] * 3, 8, temperature=1.0, seed=1)
    assert first == exported_model.continuations([ids] * 3, 8, temperature=1.0, seed=1)
    assert first != exported_model.continuations([ids] * 3, 8, temperature=1.0, seed=2)
    assert len({tuple(row) for row in first}) > 1
    assert exported_model.continuations([ids], 8, temperature=1e-6) == exported_model.continuations([ids], 8)


def test_generation_ends_at_the_end_token(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "copy")
    exported_model = OnnxModel.from_pretrained(folder)
    ids = exported_model.tokens(TEXT)
    written = exported_model.continuations([ids], 20)[0]
    config = json.loads((folder / "generation_config.json").read_text())
    config["eos_token_id"] = [written[5], 2047]
    (folder / "generation_config.json").write_text(json.dumps(config))
    shorter = OnnxModel.from_pretrained(folder).continuations([ids, ids[:3]], 20)
    assert shorter[0] == written[: written.index(written[5]) + 1]


def test_an_export_runs_without_torch(llama):
    """A process that can import neither torch nor transformers gives the same result."""
    script = f"""
import sys
for name in ("torch", "transformers", "accelerate", "datasets", "onnx", "onnxscript"):
    sys.modules[name] = None
from mxd_convert.onnx import OnnxModel
model = OnnxModel.from_pretrained({str(llama)!r})
print(model.generate({TEXT!r}, 16, steering=[{{"layer": 2, "expert": 3, "add": 2.0}}]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    here = OnnxModel.from_pretrained(llama).generate(TEXT, 16, steering=[{"layer": 2, "expert": 3, "add": 2.0}])
    assert done.stdout == f"{here}\n"


# --- text, recipe ---------------------------------------------------------------------------------------------------------------


def test_an_export_without_data_is_compared_on_held_out_text(converted, tmp_path, text):
    done = export_onnx(converted["gpt_neox"], tmp_path / "out", tokens=256, quiet=True)
    assert done.report["data"]["path"] == text.name
    assert done.report["data"]["held_out"] is True
    folder = shutil.copytree(converted["gpt_neox"], tmp_path / "copy")
    (folder / "mxd_local.json").unlink()
    done = export_onnx(folder, tmp_path / "other", tokens=256, quiet=True)
    assert done.report["data"]["path"] == "python-docs.jsonl.gz"


def test_an_export_of_a_run_on_several_texts_is_compared_on_what_they_held_out(converted, tmp_path, text):
    folder = shutil.copytree(converted["gpt_neox"], tmp_path / "copy")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["data"]["train"] = {"sources": [{"path": text.name}, {"path": text.name}]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    local = json.loads((folder / "mxd_local.json").read_text())
    (folder / "mxd_local.json").write_text(json.dumps({**local, "data": {"train": [str(text), str(text)]}}))
    done = export_onnx(folder, tmp_path / "out", tokens=256, quiet=True)
    assert done.report["data"]["path"] == f"{text.name} + {text.name}"
    assert done.report["data"]["held_out"] is True


def test_a_text_of_too_few_documents_is_replaced_by_the_shipped_one(models, tmp_path):
    """No document of the text is held out."""
    from mxd_convert.data.documents import is_held_out

    few = [text for text in (f"Text {i}: " + "some words of it. " * 60 for i in range(40)) if not is_held_out(text)][:6]
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in few))
    recipe = small_recipe(models["gpt2"], path, tmp_path / "run", layers=[1], data={"eval": {"tokens": 64}, "tokens": 512})
    mxd_convert.convert(recipe, quiet=True)
    done = export_onnx(tmp_path / "run", tmp_path / "out", tokens=256, quiet=True)
    assert done.report["data"]["path"] == "python-docs.jsonl.gz"
    assert done.report["data"]["held_out"] is None


def test_a_recipe_can_export(models, text, tmp_path, mxd, monkeypatch):
    path = tmp_path / "recipe.yaml"
    content = small_recipe(models["gpt2"], text, tmp_path / "run", layers=[1], output={"onnx": True})
    path.write_text(yaml.safe_dump(content))
    spoil = monkeypatch.context()
    with spoil as patch:
        spoilt(patch, other_rows)
        status, _, err = mxd("run", path)
        assert status == 1
        assert "ONNX export, out of tolerance" in err
        assert (tmp_path / "run" / "mxd_report.json").is_file()
        assert not (tmp_path / "run" / "onnx").exists()
    status, _, err = mxd("run", path)  # the checkpoint is finished; only the export is repeated
    assert status == 0, err
    assert OnnxModel.from_pretrained(tmp_path / "run" / "onnx").generate(TEXT, 4)
    assert not any(name.startswith("onnx") for name in belonging(tmp_path / "run"))  # a separate model
    assert mxd_convert.verify_provenance(tmp_path / "run").ok
