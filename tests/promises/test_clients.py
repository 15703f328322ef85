"""Converted models work in common tools: transformers' pipeline, Trainer, assisted generation and server, PEFT, lm-evaluation-harness.

nnsight is in tests/promises/test_other_tools.py; runtimes of exported models are in tests/promises/test_onnx_clients.py.
"""

import json
import math
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from project import ROOT
from small_runs import FAMILIES, TEXT, documents
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

import mxd_convert
from mxd_convert.base_model.load import load_base
from mxd_convert.recipe.schema import Base

GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


def model_and_tokenizer(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_pipeline_generates_text(converted, family):
    model, tokenizer = model_and_tokenizer(converted[family])
    [made] = pipeline("text-generation", model=str(converted[family]), tokenizer=tokenizer)(TEXT, **GREEDY)
    ids = model.generate(**tokenizer(TEXT, return_tensors="pt"), **GREEDY)
    assert made["generated_text"] == tokenizer.decode(ids[0], skip_special_tokens=True)
    assert len(made["generated_text"]) > len(TEXT)


def batches(tokenizer, count=64, length=32):
    ids = [token for document in documents() for token in tokenizer(document)["input_ids"]]
    return [{"input_ids": ids[i * length : (i + 1) * length], "labels": ids[i * length : (i + 1) * length]} for i in range(count)]


def train(model, tokenizer, folder, steps=20, rate=3e-3):
    """Return the losses of transformers' Trainer, step by step."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=rate,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=batches(tokenizer))
    trainer.train()
    return trainer, [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("family", FAMILIES)
def test_trainer_fine_tunes_a_converted_model(converted, family, tmp_path):
    """In 20 steps the loss falls, gates and experts change, and the saved model loads."""
    model, tokenizer = model_and_tokenizer(converted[family])
    before = {name: parameter.detach().clone() for name, parameter in model.mxd_layers()[2].named_parameters()}
    trainer, losses = train(model, tokenizer, tmp_path / "run")
    assert len(losses) == 20
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    after = dict(model.mxd_layers()[2].named_parameters())
    assert all(not before[name].equal(after[name]) for name in before), "a part of the layer was not trained"
    trainer.save_model(str(tmp_path / "saved"))
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), torch.tensor([tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        assert again(input_ids=ids).logits.equal(model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_lora_trains_saves_and_merges(converted, family, tmp_path):
    """An adapter of attention and experts is trained, saved, loaded into a new model and merged."""
    from peft import LoraConfig, PeftModel, get_peft_model

    attention = {"gpt2": "c_attn", "gpt_neox": "query_key_value", "llama": "q_proj"}[family]
    model, tokenizer = model_and_tokenizer(converted[family])
    frozen = model.mxd_layers()[0].experts.detach().clone()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=[attention, "encoder", "decoder", "gate"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    adapters = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert any("mlp.gate" in name for name in adapters)
    assert all("lora_" in name for name in adapters)
    _, losses = train(adapted, tokenizer, tmp_path / "run", rate=1e-2)
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        expected = adapted.eval()(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(converted[family])
        assert (plain(input_ids=ids).logits - expected).abs().max() > 1e-2
        again = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        assert again(input_ids=ids).logits.equal(expected)
        merged = again.merge_and_unload()
        assert merged.mxd_layers()[0].experts.equal(frozen)
        assert (merged(input_ids=ids).logits - expected).abs().max() < 1e-4 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("family", FAMILIES)
def test_assisted_generation_gives_the_same_text(converted, models, family):
    """Base and converted model draft for each other; the text equals that of plain generation."""
    model, tokenizer = model_and_tokenizer(converted[family])
    base = load_base(Base(model=str(models[family])))
    inputs = tokenizer(TEXT, return_tensors="pt")
    for writer, helper in ((model, base), (base, model)):
        alone = writer.generate(**inputs, **GREEDY)
        assert writer.generate(**inputs, **GREEDY, assistant_model=helper).equal(alone)


# --- lm-evaluation-harness --------------------------------------------------------------------------------------------------------


def test_lm_evaluation_harness_gives_our_score(converted, tmp_path):
    """The task is the total log-likelihood of local documents that each fill a block, as in our evaluation."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = converted["gpt2"]
    model, tokenizer = model_and_tokenizer(folder)
    texts = whole_blocks(tokenizer, 31)  # with the BOS before them, a block of the recipe's 32 tokens
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "rows.jsonl").write_text(rows)
    task = {
        "task": "local_text",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    }
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu", max_length=64)
    found = simple_evaluate(harness, tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0)
    theirs = next(value for key, value in found["results"]["local_text"].items() if key.startswith("byte_perplexity,"))
    ours = mxd_convert.evaluate(folder, tmp_path / "rows.jsonl", tokens=32 * len(texts), quiet=True)
    assert ours["fidelity"]["tokens"] == 31 * len(texts)
    nats, length = ours["fidelity"]["ce_converted"] * ours["fidelity"]["tokens"], sum(len(text.encode()) for text in texts)
    assert theirs == pytest.approx(math.exp(nats / length), rel=1e-5)


def whole_blocks(tokenizer, length, count=24):
    """Return texts of exactly so many tokens that survive decoding and encoding."""
    found = []
    for document in documents():
        ids = tokenizer(document, add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids) - length, length):
            text = tokenizer.decode(ids[start : start + length])
            if len(tokenizer(text, add_special_tokens=False)["input_ids"]) == length and text not in found:
                found.append(text)
    assert len(found) >= count
    return found[:count]


# --- transformers serve -----------------------------------------------------------------------------------------------------------


def test_transformers_serve_answers(converted, tmp_path):
    """examples/serve.py registers our class for transformers' server, which returns the same greedy text over HTTP."""
    folder = converted["llama"]
    model, tokenizer = model_and_tokenizer(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "examples" / "serve.py"), str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--log-level", "error"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = (tmp_path / "log").open("w")
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT) as server:
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "log")
            content = {"model": str(folder), "prompt": TEXT, "max_tokens": 12, "temperature": 0}
            answer = post(f"http://127.0.0.1:{port}/v1/completions", content)
        finally:
            server.terminate()
    ids = model.generate(**tokenizer(TEXT, return_tensors="pt"), **GREEDY)
    expected = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert (TEXT + answer["choices"][0]["text"]).strip() == expected.strip()


def wait_for(url, server, log, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"no answer from {url}: {log.read_text()[-2000:]}")


def post(url, content):
    request = urllib.request.Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)
