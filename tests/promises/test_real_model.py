"""The real 260K story model, once converted, generates stories in a process without this package."""

import json
import subprocess
import sys

import pytest
import torch

from mxd_convert import load_checkpoint
from mxd_convert.base_model.load import load_tokenizer

WITHOUT_THE_PACKAGE = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mxd_convert":
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = sys.argv[1]
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    refusal = None
except ValueError as error:
    refusal = str(error)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
text = tokenizer.decode(model.generate(**inputs, max_new_tokens=60, do_sample=False)[0], skip_special_tokens=True)
with torch.no_grad():
    logits = model(inputs["input_ids"]).logits
answer = {"text": text, "logits": logits[0].tolist(), "module": type(model).__module__}
print(json.dumps({**answer, "experts": sorted(model.mxd_layers()), "refusal": refusal}))
"""


def test_the_story_model_is_faithful_after_a_minute_and_its_experts_matter(stories):
    fidelity, reliance = stories.report["fidelity"], stories.report["reliance"]
    assert fidelity["ce_base"] == pytest.approx(1.44, abs=0.1)
    assert fidelity["delta_ce"] < 0.7
    assert fidelity["ce_zero_ablation"] - fidelity["ce_base"] > 6.0
    assert all(layer["gate_share"] > 0.8 for layer in reliance["layers"].values())
    train = stories.report["data"]["train"]
    assert train["repeats"] == pytest.approx(train["tokens"] / train["available_tokens"])
    assert train["available_tokens"] > 2_000_000  # a short run draws on all of the text


def test_the_story_model_generates_a_story_without_the_package(stories, tmp_path):
    command = [sys.executable, "-I", "-c", WITHOUT_THE_PACKAGE, str(stories.output)]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={"HF_MODULES_CACHE": str(tmp_path / "m")}, check=False
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    assert answer["module"].startswith("transformers_modules.")
    assert "trust_remote_code=True" in answer["refusal"], "without trust it must be refused, never loaded with random MLPs"
    assert answer["experts"] == [0, 1, 2, 3, 4]
    assert answer["text"].startswith("Once upon a time")
    assert len(set(answer["text"].split())) > 8
    model, tokenizer = load_checkpoint(stories.output), load_tokenizer(str(stories.output))
    with torch.no_grad():
        ours = model(tokenizer("Once upon a time", return_tensors="pt")["input_ids"]).logits[0]
    assert (ours - torch.tensor(answer["logits"])).abs().max() < 1e-5
