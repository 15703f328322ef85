"""The promise: a quantised model can be converted, and the checkpoint is an ordinary one."""

import json

import pytest
import torch
from small_runs import make_model, small_recipe
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import mxd_convert
from mxd_convert.base_model.load import load_base
from mxd_convert.base_model.quantised import linear_of
from mxd_convert.recipe.schema import Base

SETTINGS = {
    "8bit": BitsAndBytesConfig(load_in_8bit=True),
    "4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
}


@pytest.fixture(scope="module", params=SETTINGS)
def quantised(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    original = make_model("llama", folder / "original", hidden_size=64, intermediate_size=128)
    model = AutoModelForCausalLM.from_pretrained(original, quantization_config=SETTINGS[request.param], dtype=torch.float32)
    model.save_pretrained(folder / "quantised")
    AutoTokenizer.from_pretrained(original).save_pretrained(folder / "quantised")
    return folder / "quantised"


def test_the_base_computes_with_the_quantised_models_weights(quantised):
    base = load_base(Base(model=str(quantised)))
    theirs = AutoModelForCausalLM.from_pretrained(quantised, dtype=torch.float32)
    for module in theirs.modules():
        module.support_avx512bf16_for_cpu = False  # with these instructions, bitsandbytes computes 4-bit layers in bfloat16
    assert all(type(module) is nn.Linear for path, module in base.named_modules() if path.endswith("_proj"))
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        difference = (base(ids).logits - theirs(ids).logits).norm() / theirs(ids).logits.norm()
    # with 8 bits, bitsandbytes also rounds each token's activations to 8 bits
    assert difference < (0.1 if "8bit" in str(quantised) else 1e-5)


def test_its_conversion_is_an_ordinary_checkpoint(quantised, text, tmp_path):
    output = tmp_path / "converted"
    mxd_convert.convert(small_recipe(quantised, text, output, train={"joint": 0.4}), quiet=True)
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == torch.float32
    assert mxd_convert.verify_provenance(output).ok  # the hash of the dequantised base is the same in another call
    mxd_convert.delta(output, tmp_path / "delta")
    mxd_convert.apply(tmp_path / "delta", tmp_path / "restored")
    assert (tmp_path / "restored" / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()


def test_a_packed_linear_map_is_read_out_by_its_values():
    class Packed(nn.Module):
        """As GPTQ and AWQ store a map: rounded numbers and a scale, unpacked in the forward."""

        def __init__(self, bias):
            super().__init__()
            self.in_features, self.out_features = 600, 7
            self.qweight = nn.Parameter(torch.randint(-7, 8, (600, 7), dtype=torch.int8), requires_grad=False)
            self.scales = nn.Parameter(torch.rand(7) + 0.5)
            self.bias = bias

        def forward(self, x):
            return x @ (self.qweight.float() * self.scales) + (0 if self.bias is None else self.bias)

    for bias in (None, torch.randn(7)):
        packed = Packed(bias)
        linear = linear_of(packed, torch.float32, torch.device("cpu"))
        assert (linear.bias is None) == (bias is None)
        x = torch.randn(5, 600)
        torch.testing.assert_close(linear(x), packed(x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "spqr", "bits": 2}, ("quantised with spqr", "GPTQ, AWQ and GGUF")),
        ({"quant_method": "awq", "bits": 4}, ("the model can't be loaded", "pip install gptqmodel")),
    ],
)
def test_a_method_that_cant_be_dequantised_is_refused(models, tmp_path, refused, settings, words):
    config = json.loads((models["llama"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    refused("plan", "quickstart", "--set", f"base.model={tmp_path}", words=words)
