"""The joint stage trains all layers together in the model, resumes after an interruption, and is shared by processes."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from accelerate import Accelerator
from comparisons import assert_the_same
from interruptions import interrupted_run
from processes import two_processes
from safetensors.torch import load_file
from small_runs import small_recipe
from transformers import AutoModelForCausalLM

import mxd_convert
from mxd_convert import convert
from mxd_convert.base_model.capture import harvest
from mxd_convert.base_model.swap import insert_layers
from mxd_convert.layers import LayerSpec, new_layer, normalised_mse
from mxd_convert.plan import memory
from mxd_convert.training.interrupt import Interrupt
from mxd_convert.training.joint import JointStage, LayerInModel
from mxd_convert.training.loop import JOINT, Training, memory_advice

SHARE = {"joint": 0.4}
TRAIN = {"lr": 3e-2, "joint_lr": 6e-3, "k_init": 4, "init": "tokens"}


def layers_for(source, kind="mxd"):
    torch.manual_seed(3)
    made = {}
    for site in source.sites:
        hidden = 0 if "coder" in kind else 48
        gain = (0, 0) if kind == "dense_twin" else (24, 4)
        shape = LayerSpec(kind, site.d_in, hidden, site.d_out, *gain, "silu", bool(hidden), skip=kind == "skip_transcoder")
        made[site.index] = new_layer(shape, "data")
        with torch.no_grad():
            for parameter in made[site.index].parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return made


@pytest.fixture
def joint_stage(source, models, text, tmp_path):
    """Return a function that makes a joint stage of two layers of a tiny Llama."""

    def make(kind="mxd", steps=30, balance=0.0, **changes):
        plain = small_recipe(models["llama"], text, tmp_path / "out", train={**TRAIN, "balance": balance})
        recipe = mxd_convert.load_recipe(plain)
        here = source(steps=steps, **changes)
        device = Accelerator(cpu=True)
        return JointStage(recipe, here, {}, tmp_path / "state", device, True, layers_for(here, kind), 8)

    return make


@torch.no_grad()
def test_the_losses_equal_those_of_the_checkpoint(joint_stage):
    """The KL is that of a model converted by surgery; the losses of the layers come from its hidden states."""
    stage = joint_stage()
    source = stage.source
    rows = stage._rows(0)[:3]
    seen = stage._forward(rows)
    ids = source.blocks.take(rows)
    converted = insert_layers(source.base, stage.layers)
    logs = [model(input_ids=ids).logits.double().log_softmax(-1) for model in (source.base, converted)]
    mask = source.blocks.counted(rows, "bos")
    assert seen.kl.item() == pytest.approx((logs[0].exp() * (logs[0] - logs[1])).sum(-1)[mask].mean().item(), rel=1e-4)
    assert seen.counted_B.equal(mask.flatten())
    meant = harvest(source.base, source.sites, ids)
    got = {}
    for index, layer in converted.mxd_layers().items():
        layer.register_forward_hook(lambda module, inputs, output, index=index: got.update({index: output}))
    converted(input_ids=ids)
    for index in (0, 2):
        outputs = (outputs.flatten(0, 1) for outputs in (got[index], meant[index].outputs))
        expected = normalised_mse(*outputs, mask.flatten())
        assert seen.own[index].item() == pytest.approx(expected.item(), rel=1e-4)


def test_an_in_place_change_of_the_output_is_not_seen(joint_stage):
    """Falcon adds the output of attention in layer_in_model."""
    layer = joint_stage().layers[0]
    layer_in_model = LayerInModel(layer, "fp32")
    output = layer_in_model(torch.randn(2, 3, layer.d_in))
    kept = layer_in_model.output.detach().clone()
    output += 1.0
    assert layer_in_model.output.equal(kept)


@pytest.mark.parametrize("balance", [0.0, 3.0])
def test_the_gradients_equal_those_of_the_whole_step(joint_stage, balance):
    """Gradients summed over pieces of one block equal those of the whole step by autograd."""
    stage = joint_stage(balance=balance)
    stage.prepare()
    parameters = [parameter for layer in stage.layers.values() for parameter in layer.parameters()]
    sinks = {index: layer.sinks for index, layer in stage.layers.items()}
    for layer in stage.layers.values():
        layer.sinks = {}  # all gradients whole, by autograd
    for _ in range(2):  # the first finds the means about which moments are taken
        seen = stage._forward(stage._rows(0))
        stage._add_to_balances(seen)
        stage._settle_balances()
    terms = [stage.balances[index].of(measured) for index, measured in seen.measured.items()]
    assert sum(term.item() for term in terms) > 0 or not balance
    whole = torch.autograd.grad(seen.kl + stage.weight * torch.stack([*seen.own.values(), *terms]).sum(), parameters)
    for index, layer in stage.layers.items():
        layer.sinks = sinks[index]
    stage._blocks_a_piece = lambda: 1
    stage._forward_backward(0, Interrupt())
    for parameter, expected in zip(parameters, whole, strict=True):
        sink = stage.optimiser.sinks.get(parameter)
        made = parameter.grad if sink is None else sink.rows(0, len(parameter))
        if sink is not None and parameter.grad is not None:
            made = made + parameter.grad
        assert torch.allclose(made, expected, atol=2e-5 * expected.abs().max().item()), expected.shape


@pytest.mark.parametrize("kind", ["mxd", "transcoder", "skip_transcoder", "dense_twin", "random_gate"])
def test_the_joint_stage_reduces_the_kl_to_the_base(joint_stage, kind):
    stage = joint_stage(kind)
    before = stage._forward(stage._rows(0)).kl
    still = stage.layers[0].gate.weight.clone() if kind == "random_gate" else None
    stage.train(Interrupt())
    after = stage._forward(stage._rows(0)).kl
    assert after < 0.7 * before
    line = json.loads(stage.log_path.read_text().splitlines()[-1])
    assert after.item() / 2 < line["kl"] < before.item()
    if still is not None:
        assert stage.layers[0].gate.weight.equal(still)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in stage.source.base.parameters())


def test_both_losses_have_the_same_weight_at_first(joint_stage):
    stage = joint_stage()
    stage.prepare()
    seen = stage._forward(stage._rows(0)[: stage._blocks_a_piece()])
    assert stage.weight * sum(loss.item() for loss in seen.own.values()) == pytest.approx(seen.kl.item(), rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_a_run_with_a_joint_stage_logs_both_stages(models, text, tmp_path, family):
    result = convert(small_recipe(models[family], text, tmp_path / "out", train=SHARE), quiet=True)
    lines = [json.loads(line) for line in (result.output / "training_log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))
    assert steps[-1] == 16
    assert lines[-1]["tokens"] == 4096
    assert set(lines[-1]["layers"]) == {"0", "1", "2"}
    assert 0 < lines[-1]["lr"] < lines[0]["lr"]
    assert ["kl" in line for line in lines] == [line["step"] > 10 for line in lines]  # the last 6 of 16 are the joint stage's
    assert lines[-1]["kl"] > 0
    ours, theirs = load_file(result.output / "model.safetensors"), load_file(models[family] / "model.safetensors")
    shared = ours.keys() & theirs.keys()  # training changes nothing in the model but the layers
    assert len(shared) > 10
    assert all(torch.equal(ours[name], theirs[name]) for name in shared)


@pytest.mark.parametrize("step", [1, 6])
def test_a_joint_stage_that_was_interrupted_resumes_and_ends_the_same(models, text, tmp_path, step):
    settings = {"train": SHARE, "data": {"tokens": 8192}}
    whole = convert(small_recipe(models["llama"], text, tmp_path / "whole", **settings), quiet=True)
    recipe = small_recipe(models["llama"], text, tmp_path / "cut", **settings)
    interrupted_run(recipe, step, JointStage)
    assert (tmp_path / "cut.partial" / "state" / JOINT).is_dir()
    done = convert(recipe, quiet=True)
    assert done.report["cost"]["resumed_at_steps"] == [19 + step + 1]  # the last 13 of 32 steps are the joint stage's
    assert_the_same(done, whole)


@pytest.mark.parametrize(("settings", "peak"), [({"lr": 1e-2}, 5e-4), ({"lr": 1e-2, "joint_lr": 2e-3}, 2e-3)])
def test_the_rate_of_the_joint_stage_is_a_twentieth_of_the_layers_own_or_its_own_key(models, text, tmp_path, settings, peak):
    settings = {"train": {**SHARE, **settings, "log_every": 1}, "data": {"tokens": 4096}}
    result = convert(small_recipe(models["llama"], text, tmp_path / "out", **settings), quiet=True)
    lines = [json.loads(line) for line in (result.output / "training_log.jsonl").read_text().splitlines()]
    assert max(line["lr"] for line in lines if "kl" in line) == pytest.approx(peak)


def test_the_joint_stage_is_independent_of_groups_and_order(models, text, tmp_path, monkeypatch):
    settings = {"data": {"tokens": 8192}}
    whole = convert(small_recipe(models["llama"], text, tmp_path / "whole", **settings, train=SHARE), quiet=True)
    plan = mxd_convert.make_plan(mxd_convert.load_recipe(small_recipe(models["llama"], text, tmp_path / "split", **settings)))
    room = memory.estimate(plan, plan.layers[:1]).training
    monkeypatch.setattr(memory, "_joint", lambda plan, processes: 1)
    train = {**SHARE, "memory_gib": room / 2**30}
    groups = []
    one = Training._train_group
    monkeypatch.setattr(Training, "_train_group", lambda self, group, *rest: groups.append(group) or one(self, group, *rest))
    split = convert(small_recipe(models["llama"], text, tmp_path / "split", **settings, train=train), quiet=True)
    assert len(groups) > 1
    assert_the_same(split, whole)
    settings["train"] = {**SHARE, "order": "sequential", "target": "teacher"}
    last = convert(small_recipe(models["llama"], text, tmp_path / "s", **settings), quiet=True)
    ends = []
    for result in (last, whole):
        lines = [json.loads(line) for line in (result.output / "training_log.jsonl").read_text().splitlines()]
        found = [line["kl"] for line in lines if "kl" in line]
        assert found[-1] < found[0]
        ends.append(found[-1])
    assert ends[0] == pytest.approx(ends[1], rel=0.2)


IN_PIECES = """
import json, sys
from mxd_convert import convert
from mxd_convert.training.joint import JointStage
from mxd_convert.training.stage import Stage
recipe, take = json.loads(sys.argv[1]), Stage._step
def interrupted(self, number, interrupt):
    interrupt.requested = isinstance(self, JointStage) and number == 5
    take(self, number, interrupt)
Stage._step = interrupted
try:
    convert(recipe, quiet=True)
except KeyboardInterrupt:
    Stage._step = take
    print(convert(recipe, quiet=True).report["cost"]["resumed_at_steps"])
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_the_joint_stage_learns_the_same_on_a_gpu_as_on_a_cpu(models, text, tmp_path, family):
    """Each device has its process, since accelerate chooses a device once. The joint stage is interrupted and resumed."""
    lines = {}
    for device in ("cpu", "cuda"):
        train = {**SHARE, "device": device, "init": "tokens", "k_init": 8}
        recipe = small_recipe(models[family], text, tmp_path / device, data={"tokens": 8192}, train=train)
        done = subprocess.run([sys.executable, "-c", IN_PIECES, json.dumps(recipe)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "[25]"  # the last 13 of 32 steps are the joint stage's
        lines[device] = [json.loads(line) for line in (tmp_path / device / "training_log.jsonl").read_text().splitlines()]
    joint = [[line["kl"] for line in lines[device] if "kl" in line] for device in ("cpu", "cuda")]
    assert joint[0][-1] < joint[0][0]
    assert joint[1] == pytest.approx(joint[0], rel=1e-2)
    # Weights are not compared: devices may choose different experts where two are equal. With equal experts at initialisation, weights
    # differed by a tenth between an H100 and a CPU, and between two orders of ties on a CPU, while the KL differed by 3e-3 of it.
    ids = torch.randint(5, 300, (8, 32), generator=torch.Generator().manual_seed(0))
    base, *learnt = (log_probabilities(path, ids) for path in (models[family], tmp_path / "cpu", tmp_path / "cuda"))
    assert divergence(*learnt) <= 0.02 * divergence(base, learnt[0])


@torch.no_grad()
def log_probabilities(path, ids):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(input_ids=ids).logits.double().log_softmax(-1)


def divergence(one, other):
    return (one.exp() * (one - other)).sum(-1).mean().item()


@pytest.mark.parametrize("distribute", ["data", "layers"])
def test_two_processes_share_the_joint_stage(models, text, tmp_path, distribute):
    settings = {"data": {"tokens": 16_384}}
    one = convert(small_recipe(models["llama"], text, tmp_path / "one", **settings, train=SHARE), quiet=True)
    recipe = tmp_path / "recipe.yaml"
    train = {**SHARE, "distribute": distribute}
    recipe.write_text(yaml.safe_dump(small_recipe(models["llama"], text, tmp_path / "two", **settings, train=train)))
    done = two_processes(recipe)
    _, errors = done.communicate(timeout=120)
    assert done.returncode == 0, errors
    ours, theirs = load_file(tmp_path / "two" / "model.safetensors"), load_file(one.output / "model.safetensors")
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=1e-3), name


def test_impossible_joint_stages_are_refused(refused, recipe, monkeypatch):
    refused("run", recipe(train={"joint": 1.0}), words=("train.joint", "1.0"))
    refused("run", recipe(train={"joint": 0.3}, layer={"sparsity": "l1"}), words=("train.joint", "l1", "0"))
    refused("run", recipe(train={"joint": 0.3}, base={"dtype": "float16"}), words=("train.joint", "0.3", "base.dtype: float32"))
    with monkeypatch.context() as patched:
        patched.setattr(memory, "base_room", lambda plan, room: 2**20)
        refused("run", recipe(train={"joint": 0.3}), words=("train.joint", "spread", "Set train.joint: 0"))
    monkeypatch.setattr(memory, "_joint", lambda plan, processes: 2**50)
    refused("run", recipe(train={"joint": 0.3}), words=("train.joint", "GiB", "Set train.joint: 0", "layer.experts"))


def test_advice_on_memory_names_no_setting_that_is_refused(models, text, tmp_path):
    """A smaller pass does not help a joint stage, which needs all layers at once."""
    plain, joint_stage = (
        mxd_convert.load_recipe(small_recipe(models["llama"], text, tmp_path / "out", train={"joint": share}))
        for share in (0.0, 0.3)
    )
    assert "train.memory_gib" in memory_advice(plain)
    assert "train.memory_gib" not in memory_advice(joint_stage)
    assert "train.joint: 0 (0.3)" in memory_advice(joint_stage)
