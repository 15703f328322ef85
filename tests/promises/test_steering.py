"""Steering changes coefficients and nothing else: in forwards, in generate with cache, batches and beams, and as a saved preset."""

import json
import subprocess
import sys

import pytest
import torch
from observations import LAYER, active_expert, ids_of, seen
from random_layers import small_layer
from transformers import AutoModelForCausalLM

import mxd_convert
from mxd_convert import InputError, load_checkpoint, steer
from mxd_convert.modeling.layers_mxd import build_layer, coefficient


@pytest.fixture
def model(converted):
    return load_checkpoint(converted["llama"])


@torch.no_grad()
def test_each_way_of_steering_sets_the_coefficient(model):
    """The reference is the explicit gain, sum_n a_n c_n with the coefficient replaced."""
    ids = ids_of()
    n = active_expert(model, ids)
    layer = model.mxd_layers()[LAYER]
    ways = {
        "add": lambda a: a + 3.0,
        "set": lambda a: torch.full_like(a, 3.0),
        "scale": lambda a: 3.0 * a,
        "ablate": lambda a: 0 * a,
    }
    for how, changed in ways.items():
        watched = seen(model)
        with watched as coefficients, steer(model, LAYER, n, **{how: True if how == "ablate" else 3.0}):
            model(input_ids=ids)
        a = coefficient(coefficients[-1], n)
        assert (a > 0).any()
        values, indices = coefficients[-1]
        plain = (values.unsqueeze(-1) * layer.experts[indices]).sum(-2)
        expected = plain + (changed(a) - a).unsqueeze(-1) * layer.experts[n]
        assert torch.allclose(watched.gains[-1], expected, atol=1e-5), how
    assert layer.steering == []


@pytest.mark.parametrize("kind", ["mxd", "transcoder", "skip_transcoder", "random_gate"])
@torch.no_grad()
def test_every_kind_with_experts_is_steered_with_dense_coefficients(kind):
    layer, x = build_layer(small_layer(kind, sparsity="l1").entry()).double(), torch.randn(2, 5, 7, dtype=torch.float64)
    layer.load_state_dict(small_layer(kind, sparsity="l1").state_dict())
    before = layer(x)
    for how, change in {"add": lambda a: 2.0, "set": lambda a: 2.0 - a, "scale": lambda a: a, "ablate": lambda a: -a}.items():
        a = layer.encode(x)[..., 3:4]
        layer.steering = [{"expert": 3, how: True if how == "ablate" else 2.0}]
        assert (a > 0).any()
        assert torch.allclose(layer(x), before + change(a) * layer.experts[3] * layer.linear(x), atol=1e-6)
        layer.steering = []


@torch.no_grad()
def test_several_experts_and_nested_contexts_combine(model):
    ids = ids_of()
    plain = model(input_ids=ids).logits
    with steer(model, LAYER, [3, 5], add=2.0):
        both = model(input_ids=ids).logits
    with steer(model, LAYER, 3, add=2.0), steer(model, LAYER, 5, add=2.0):
        nested = model(input_ids=ids).logits
    with steer(model, LAYER, 3, add=2.0), steer(model, LAYER, 3, set=7.0), steer(model, LAYER, 3, scale=2.0):
        chain = model(input_ids=ids).logits
    with steer(model, LAYER, 3, set=14.0):
        at_once = model(input_ids=ids).logits
    assert torch.equal(both, nested)
    assert torch.allclose(chain, at_once, atol=1e-5)
    assert not torch.allclose(both, plain, atol=1e-3)
    assert torch.equal(model(input_ids=ids).logits, plain)


def written(model, ids, **settings):
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **settings}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("positions", ["all", "prompt", "generation"])
def test_generate_steers_exactly_the_chosen_positions(converted, family, settings, positions):
    """With cache, beams and a batch, the gains show the added amount at each chosen position and nothing elsewhere."""
    model = load_checkpoint(converted[family])
    layer, ids = model.mxd_layers()[LAYER], ids_of()
    watched, prompt = seen(model), ids.shape[1]
    with watched as coefficients, steer(model, LAYER, 3, add=50.0, positions=positions):
        written(model, ids, **settings)
    steered_at, first = set(), 0
    for (values, indices), gain in zip(coefficients, watched.gains, strict=True):
        plain = (values.unsqueeze(-1) * layer.experts[indices]).sum(-2)
        added = ((gain - plain) @ layer.experts[3]) / layer.experts[3].square().sum()
        assert torch.isclose(added, torch.tensor(50.0), atol=1e-2).logical_or(added.abs() < 1e-2).all()
        first = 0 if settings.get("use_cache") is False else first
        for offset in range(added.shape[1]):
            column = added[:, offset] > 25
            assert column.all() or not column.any()
            steered_at |= {first + offset} if column.any() else set()
        first += added.shape[1]
    everywhere = set(range(prompt + 5))
    expected = {"all": everywhere, "prompt": set(range(prompt)), "generation": everywhere - set(range(prompt))}[positions]
    assert steered_at == expected


def test_steered_text_is_the_same_with_cache_and_batch(model):
    ids = ids_of()
    for positions in ("all", "prompt", "generation"):
        with steer(model, LAYER, 3, add=5.0, positions=positions):
            cached, plain = written(model, ids), written(model, ids, use_cache=False)
            alone = torch.cat([written(model, row[None]) for row in ids])
        assert torch.equal(cached, plain), positions
        assert torch.equal(cached, alone), positions


def test_a_preset_is_stored_in_the_checkpoint(model, tmp_path):
    """The preset works in this package and, in a process without it, in the checkpoint's own code."""
    ids = ids_of()
    orders = [{"layer": LAYER, "expert": 3, "add": 50.0}, {"layer": 0, "expert": 1, "ablate": True, "positions": "generation"}]
    with steer(model, LAYER, 3, add=50.0), steer(model, 0, 1, ablate=True, positions="generation"):
        expected = written(model, ids)
    assert not torch.equal(expected, written(model, ids))
    model.set_steering(orders)
    assert torch.equal(written(model, ids), expected)
    model.save_pretrained(tmp_path / "steered")
    assert json.loads((tmp_path / "steered" / "config.json").read_text())["mxd"]["steering"] == [
        {**orders[0], "positions": "all"},
        orders[1],
    ]
    assert torch.equal(written(AutoModelForCausalLM.from_pretrained(tmp_path / "steered"), ids), expected)
    alone = (
        "import sys, torch, transformers; sys.modules['mxd_convert'] = None;"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'steered')!r}, trust_remote_code=True);"
        f"ids = torch.tensor({ids.tolist()});"
        "print(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0,"
        " eos_token_id=None).tolist())"
    )
    out = subprocess.run([sys.executable, "-c", alone], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert json.loads(out.strip().splitlines()[-1]) == expected.tolist()
    model.set_steering([])
    assert "steering" not in model.config.mxd


@pytest.mark.parametrize(
    ("orders", "words"),
    [
        ({"layer": 1, "expert": 0, "add": 1.0}, "layer 1 is not converted. Converted layers: 0, 2"),
        ({"layer": 0, "expert": 24, "add": 1.0}, r"no expert 24\. It has experts 0 to 23"),
        ({"layer": 0, "expert": 0}, r"no change given\. Give exactly one of add, set, scale, ablate"),
        ({"layer": 0, "expert": 0, "add": 1.0, "set": 2.0}, "add, set given"),
        ({"layer": 0, "expert": 0, "add": float("nan")}, "add is nan"),
        ({"layer": 0, "expert": 0, "ablate": 1.0}, "expected true"),
        ({"layer": 0, "expert": 0, "add": 1.0, "positions": "some"}, "expected one of all, prompt, generation"),
    ],
)
def test_impossible_steering_is_refused(model, orders, words):
    with pytest.raises(ValueError, match=words):
        model.set_steering([orders])
    with pytest.raises(InputError, match=words), mxd_convert.evaluation.steering.steered(model, [orders]):
        pass


def test_a_preset_that_does_not_fit_is_reported(copy, refused):
    config = json.loads((copy / "config.json").read_text())
    config["mxd"]["steering"] = [{"layer": 0, "expert": 99, "add": 1.0}]
    (copy / "config.json").write_text(json.dumps(config))
    refused("generate", copy, "--prompt", "a", words=("experts 0 to 23", "99"))


def test_the_command_line_steers_in_every_way(mxd, converted):
    for text, order in {
        "0:3:+5": {"add": 5.0},
        "0:3:-5": {"add": -5.0},
        "0:3:5": {"add": 5.0},
        "0:3:=-5": {"set": -5.0},
        "0:3:x.5": {"scale": 0.5},
        "0:3:off": {"ablate": True},
    }.items():
        assert mxd_convert.parse_steering(text, "prompt") == {"layer": 0, "expert": 3, **order, "positions": "prompt"}
    arguments = (
        "generate",
        converted["gpt2"],
        "--prompt",
        "The value",
        "--max-new-tokens",
        4,
        "--steer",
        "0:3:=9",
        "--positions",
    )
    status, out, _ = mxd(*arguments, "generation", "--json")
    assert status == 0
    assert json.loads(out)["steering"] == [{"layer": 0, "expert": 3, "set": 9.0, "positions": "generation"}]
    assert mxd(*arguments, "nowhere")[0] == 2
