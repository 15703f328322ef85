"""Passes and groups, the shuffled buffer, sequential order and memory limits."""

import json

import numpy as np
import pytest
import torch
from comparisons import assert_the_same
from interruptions import interrupted_run
from safetensors.torch import load_file
from small_runs import small_recipe
from torch import nn

import mxd_convert
import mxd_convert.commands.run
from mxd_convert import convert
from mxd_convert.base_model.capture import harvest
from mxd_convert.base_model.swap import replaced
from mxd_convert.data.blocks import block_order
from mxd_convert.errors import InputError, is_out_of_memory
from mxd_convert.layers import MxD
from mxd_convert.plan.memory import estimate, groups
from mxd_convert.training import state
from mxd_convert.training.log import merge_logs, split_log
from mxd_convert.training.stream import Activations, buffer_steps
from mxd_convert.training.window import Window

CPU = torch.device("cpu")


def rows(*tensors):
    """Return the sorted rows of tensors side by side, which do not depend on their order."""
    joined = torch.cat([tensor.flatten(1).double() for tensor in tensors], dim=1).numpy()
    return joined[np.lexsort(joined.T[::-1])]


def test_a_buffer_returns_every_token_once_and_mixes_blocks(source):
    made = source()
    stream = Activations(made, CPU)
    first = block_order(len(made.blocks), 0, 12, 5)
    seen = harvest(made.base, made.sites, made.blocks.take(first))
    batches = [stream.batch(step) for step in range(3)]
    assert [len(batch.counted_B) for batch in batches] == [128, 128, 128]
    for index in (0, 2):
        whole = rows(seen[index].inputs.flatten(0, 1), seen[index].outputs.flatten(0, 1))
        dealt = rows(*(torch.cat([batch.activations[index][part] for batch in batches]) for part in (0, 1)))
        assert np.abs(whole - dealt).max() < 1e-5
    assert sum(int(batch.counted_B.sum()) for batch in batches) == int(made.blocks.counted(first, "bos").sum())
    # the first step holds tokens of (nearly) all twelve blocks, not of four
    inputs = seen[0].inputs
    first = batches[0].activations[0][0]
    blocks = {int((inputs - row).abs().amax(-1).flatten().argmin()) // made.blocks.context for row in first[:60]}
    assert len(blocks) > 8


def test_a_stream_that_begins_in_the_middle_gives_the_same_batches(source):
    through = Activations(source(), CPU)
    expected = [through.batch(step).activations[2][0].clone() for step in range(8)]
    for start in (1, 4, 7):
        resumed = Activations(source(), CPU)
        for step in range(start, 8):
            assert torch.equal(resumed.batch(step).activations[2][0], expected[step])


def test_two_processes_together_see_the_tokens_of_one(source):
    whole = Activations(source(), CPU)
    parts = [Activations(source(process=(index, 2)), CPU) for index in range(2)]
    for step in range(8):
        batches = [part.batch(step) for part in parts]
        together = rows(torch.cat([batch.activations[0][0] for batch in batches]))
        assert np.abs(together - rows(whole.batch(step).activations[0][0])).max() < 1e-5
        assert sum(len(batch.counted_B) for batch in batches) == 128


def test_the_buffer_is_bounded(source):
    sites = source().sites
    assert buffer_steps(1, sites) == 16
    assert buffer_steps(10**9, sites) == 4
    assert buffer_steps(2**28 // (4 * sum(site.d_in + site.d_out for site in sites)) // 7, sites) == 7


def test_sequential_inputs_and_both_targets_are_exact(source):
    """Inputs come from the layers below; targets are the MLP's output for that input, or the base's output for its own."""

    class Doubled(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.mlp = mlp

        def forward(self, x):
            return 2 * self.mlp(x)

    plain = source(sites=source().sites[1:])
    base = plain.base
    below = {"model.layers.0.mlp": Doubled(base.get_submodule("model.layers.0.mlp"))}
    mlp = base.get_submodule("model.layers.2.mlp")
    ids = plain.blocks.take(block_order(len(plain.blocks), 0, 12, 5))
    with replaced(base, below):
        moved = harvest(base, plain.sites, ids)[2].inputs.flatten(0, 1)
    original = harvest(base, plain.sites, ids)[2]
    assert (moved - original.inputs.flatten(0, 1)).abs().max() > 0.1
    for teacher in (False, True):
        stream = Activations(source(sites=plain.sites, below=below, teacher=teacher), CPU)
        batches = [stream.batch(step).activations[2] for step in range(3)]
        target = original.outputs.flatten(0, 1) if teacher else mlp(moved)
        dealt = rows(*(torch.cat([batch[part] for batch in batches]) for part in (0, 1)))
        assert np.abs(dealt - rows(moved, target)).max() < 1e-5


def test_logged_figures_equal_those_in_float64():
    layer = MxD(6, 8, 5, n_experts=7, k=2)
    window = Window.empty(layer, CPU)
    generator = torch.Generator().manual_seed(0)
    outputs, targets, counts, active = [], [], [], []
    for tokens in (600, 1, 300):
        output_BO, target_BO = (
            torch.randn(tokens, 5, generator=generator) + 30 for _ in range(2)
        )  # far from zero, as some outputs are
        counted_B = torch.rand(tokens, generator=generator) > 0.1
        coefficients = layer.encode(torch.randn(tokens, 6, generator=generator))
        window.add(torch.tensor(0.5), output_BO, target_BO, coefficients, counted_B)
        for found, tensor in ((outputs, output_BO), (targets, target_BO), (counts, counted_B), (active, coefficients[0] > 0)):
            found.append(tensor)
    counted = torch.cat(counts)
    output, target = (torch.cat(parts).double()[counted] for parts in (outputs, targets))
    figures = window.figures()
    assert figures["fvu"] == pytest.approx(
        ((output - target).square().sum() / (target - target.mean(0)).square().sum()).item(), rel=1e-4
    )
    assert figures["l0"] == pytest.approx(torch.cat(active)[counted].sum().item() / len(output))
    assert figures["loss"] == pytest.approx(0.5)


def test_groups_that_fit_the_budget_end_as_one_pass(models, text, tmp_path):
    settings = {"layers": "all", "data": {"tokens": 8192}, "train": {"init": "tokens"}}
    whole = convert(small_recipe(models["llama"], text, tmp_path / "whole", **settings), quiet=True)
    plan = mxd_convert.make_plan(mxd_convert.load_recipe(small_recipe(models["llama"], text, tmp_path / "split", **settings)))
    room = estimate(plan, plan.layers[:2]).training
    assert groups(plan, [0, 1, 2], room) == [[0, 1], [2]]
    assert groups(plan, [0, 1, 2], room - 1) == [[0], [1], [2]]
    settings["train"] |= {"memory_gib": room / 2**30}
    split = convert(small_recipe(models["llama"], text, tmp_path / "split", **settings), quiet=True)
    assert_the_same(split, whole)
    assert split.report["recipe_sha256"] == whole.report["recipe_sha256"]  # memory settings do not change the hash of the recipe


def begin(recipe: dict) -> tuple[float, float]:
    """Interrupt a run at step 14 of the pass over its first two layers; return the budgets (GiB) for two layers and for one."""
    plan = mxd_convert.make_plan(mxd_convert.load_recipe(recipe))
    two, one = (estimate(plan, plan.layers[:count]).training / 2**30 for count in (2, 1))
    interrupted_run(recipe, 13, overrides={"train.memory_gib": two})
    return two, one


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_groups_that_change_in_between_resume_and_end_the_same(models, text, tmp_path, capsys, moments):
    settings = {"layers": "all", "data": {"tokens": 8192}, "train": {"moments": moments, "init": "tokens"}}
    whole = convert(small_recipe(models["llama"], text, tmp_path / "whole", **settings), quiet=True)
    recipe = small_recipe(models["llama"], text, tmp_path / "cut", **settings)
    _, one = begin(recipe)
    assert [folder.name for folder in (tmp_path / "cut.partial" / "state").iterdir()] == ["layers-0-1"]
    done = convert(recipe, overrides={"train.memory_gib": one})
    assert done.report["cost"]["resumed_at_steps"] == [14]
    errors = capsys.readouterr().err
    for layer in (0, 1):  # the group no longer fitted, so its layers resume one by one
        assert f"resumed at step 14 of 32 of layer {layer} (pass {layer + 1} of 3)" in errors
    assert_the_same(done, whole)


@pytest.mark.parametrize("cut", ["save_state", "split_log", "remove_state"])
def test_a_split_that_was_interrupted_is_repeated(models, text, tmp_path, monkeypatch, cut):
    """The interruption comes while the second part is saved, or before the group's state is removed."""
    settings = {"layers": "all", "data": {"tokens": 8192}}
    whole = convert(small_recipe(models["llama"], text, tmp_path / "whole", **settings), quiet=True)
    recipe = small_recipe(models["llama"], text, tmp_path / "cut", **settings)
    two, one = begin(recipe)
    make, calls = getattr(state, cut), []

    def killed(*given):
        calls.append(1)
        if len(calls) == (1 if cut == "remove_state" else 2):
            raise KeyboardInterrupt
        return make(*given)

    with monkeypatch.context() as patched:
        patched.setattr(state, cut, killed)
        with pytest.raises(KeyboardInterrupt):
            convert(recipe, overrides={"train.memory_gib": one}, quiet=True)
    assert len(list((tmp_path / "cut.partial" / "state").iterdir())) > 1
    done = convert(recipe, overrides={"train.memory_gib": two}, quiet=True)
    assert_the_same(done, whole)


def test_a_part_of_a_group_has_its_own_learning_rate(tmp_path):
    (tmp_path / "whole").write_text(
        json.dumps({"step": 4, "tokens_per_second": 100.0, "layers": {"0": {}, "1": {}, "2": {}}}) + "\n"
    )
    split_log(tmp_path / "whole", tmp_path / "a", [0])
    split_log(tmp_path / "whole", tmp_path / "b", [1, 2])
    merge_logs([[tmp_path / "a", tmp_path / "b"]], tmp_path / "merged")
    merge_logs([[tmp_path / "a"], [tmp_path / "b"]], tmp_path / "beside")
    rates = [json.loads((tmp_path / name).read_text())["tokens_per_second"] for name in ("a", "b", "merged", "beside")]
    assert rates == [300.0, 150.0, 100.0, 150.0]


def test_the_time_of_a_split_group_counts_once(tmp_path):
    tensors = {f"{index}/weight": torch.full((2,), float(index)) for index in (1, 2, 11)}
    state.save_state(tmp_path / "whole", 7, tensors, {"layers": [1, 2, 11], "seconds": 6.0}, "print")
    state.split_state(tmp_path / "whole", {tmp_path / "a": [1], tmp_path / "b": [2, 11]}, "print")
    assert not (tmp_path / "whole").exists()
    for part, indices, seconds in (("a", [1], 2.0), ("b", [2, 11], 4.0)):
        step, own, facts = state.load_state(tmp_path / part, "print")
        assert (step, facts["layers"], facts["seconds"]) == (7, indices, seconds)
        assert {name: tensor.tolist() for name, tensor in own.items()} == {f"{i}/weight": [i, i] for i in indices}


def test_a_budget_below_one_layer_is_refused(tmp_path, refused, recipe):
    message = refused(
        "run", recipe(train={"memory_gib": 0.1}), words=("train.memory_gib: 0.1", "layer.experts (24)", "train.batch_tokens")
    )
    assert "about 0.5" in message
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("target", ["local", "teacher"])
def test_sequential_training_learns_the_outputs_of_the_layers_below(models, text, tmp_path, target):
    settings = {"layers": [0, 2], "data": {"tokens": 32_768}, "layer": {"k": 1, "hidden": 6, "shared_expert": False}}
    sequential = {**settings, "train": {"order": "sequential", "target": target}}
    result = convert(small_recipe(models["gpt2"], text, tmp_path / "sequential", **sequential), quiet=True)
    parallel = convert(small_recipe(models["gpt2"], text, tmp_path / "parallel", **settings), quiet=True)
    ours, theirs = (load_file(made.output / "model.safetensors") for made in (result, parallel))
    for name, tensor in ours.items():  # only the later layer has other inputs
        assert torch.equal(tensor, theirs[name]) == (".h.2.mlp." not in name), name
    layers, others = (made.report["fidelity"]["layers"]["2"] for made in (result, parallel))
    assert layers[f"fvu_in_place_{target}"] < others[f"fvu_in_place_{target}"]
    first = result.report["fidelity"]["layers"]["0"]
    assert first["fvu_in_place_local"] == pytest.approx(first["fvu"], rel=1e-4)
    assert first["fvu_in_place_teacher"] == pytest.approx(first["fvu"], rel=1e-4)
    steps = [json.loads(line) for line in (result.output / "training_log.jsonl").read_text().splitlines()]
    assert all(set(line["layers"]) == {"0", "2"} for line in steps)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"target": "teacher"}, ("train.target", "teacher", "sequential")),
        ({"order": "sequential", "distribute": "layers"}, ("train.distribute", "layers", "sequential")),
        ({"memory_gib": 0}, ("train.memory_gib", "0")),
        ({"moments": "int4"}, ("train.moments", "int4", "bf16")),
        ({"init": "base"}, ("train.init", "base", "tokens", "paper")),
        ({"k_init": 3}, ("train.k_init", "3", "layer.k (4)")),
        ({"k_init": 25}, ("train.k_init", "25", "24")),
    ],
)
def test_inconsistent_settings_are_refused(refused, recipe, train, words):
    refused("run", recipe(train=train), words=words)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
@pytest.mark.parametrize("failing", ["mxd_convert.training.stage.forward_backward", "mxd_convert.training.stage.Optimiser"])
def test_the_out_of_memory_error_names_the_setting_to_lower(models, text, tmp_path, monkeypatch, error, failing):
    def fail(*arguments, **named):
        raise error

    assert is_out_of_memory(error)
    monkeypatch.setattr(failing, fail)
    with pytest.raises(
        InputError, match=r"out of memory while training. Lower train.batch_tokens \(256\) or .* train.memory_gib"
    ):
        convert(small_recipe(models["gpt2"], text, tmp_path / "out"), quiet=True)


def test_the_error_of_a_loss_that_is_not_finite_names_the_last_state(models, text, tmp_path, monkeypatch):
    from mxd_convert.training import stage

    forward_backward, calls = stage.forward_backward, []

    def spoil(*arguments):
        calls.append(1)
        return forward_backward(*arguments) * (float("nan") if len(calls) > 6 else 1.0)

    monkeypatch.setattr("mxd_convert.training.stage.forward_backward", spoil)
    settings = {"layers": [1], "train": {"checkpoint_every": 3}, "data": {"tokens": 8192}}
    with pytest.raises(InputError, match=r"layer 1: the loss is not finite at step 7; the last good state is at step"):
        convert(small_recipe(models["gpt2"], text, tmp_path / "out", **settings), quiet=True)


def test_moments_in_bf16_train_and_resume(models, text, tmp_path):
    settings = {"layers": [1], "train": {"moments": "bf16"}, "data": {"tokens": 16_384}}
    rough = convert(small_recipe(models["gpt2"], text, tmp_path / "rough", **settings), quiet=True)
    settings["train"] = {}
    exact = convert(small_recipe(models["gpt2"], text, tmp_path / "exact", **settings), quiet=True)
    ours, theirs = (result.report["fidelity"]["layers"]["1"]["fvu"] for result in (rough, exact))
    assert ours != theirs
    assert ours == pytest.approx(theirs, rel=0.1)


@pytest.mark.parametrize("order", ["parallel", "sequential"])
def test_a_base_larger_than_memory_is_spread_and_gives_the_same(models, text, tmp_path, monkeypatch, capsys, order):
    settings = {"layers": [0, 2], "train": {"order": order}}
    whole = convert(small_recipe(models["llama"], text, tmp_path / "whole", **settings), quiet=True)
    monkeypatch.setattr("mxd_convert.plan.memory.BASE_SHARE", 1e-5)  # about 200 KB: the embedding and a layer or two
    loaded = []
    load = mxd_convert.commands.run.load_base
    monkeypatch.setattr(
        "mxd_convert.commands.run.load_base", lambda *given, **named: loaded.append(load(*given, **named)) or loaded[-1]
    )
    spread = convert(small_recipe(models["llama"], text, tmp_path / "spread", **settings))
    assert "disk" in {str(device) for device in loaded[0].hf_device_map.values()}
    assert "accelerate spreads it" in capsys.readouterr().err
    ours, theirs = (load_file(result.output / "model.safetensors") for result in (spread, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
