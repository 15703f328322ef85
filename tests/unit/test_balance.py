"""The balance term keeps gate, hidden, product and identity share and the directions of the gain above their floors."""

import json

import pytest
import torch
from comparisons import assert_the_same
from interruptions import interrupted_run
from small_runs import small_recipe

import mxd_convert
from mxd_convert.evaluation.moments import Moments, shares
from mxd_convert.training import balance
from mxd_convert.training.balance import FLOORS, Balance
from mxd_convert.training.joint import JointStage
from mxd_convert.training.stage import Stage
from mxd_convert.training.stream import Activations

CPU = torch.device("cpu")
TOKENS, WIDTH = 600, 5
COUNTED = torch.arange(TOKENS) % 3 > 0
FVU = 0.2
TARGET = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(2)) + 5
TARGET = (TARGET - TARGET[COUNTED].mean(0)) / TARGET[COUNTED].std(0, correction=0) + 5  # of variance 1
STRENGTH = 2 + torch.randn(TOKENS, generator=torch.Generator().manual_seed(1)).square()


def factors(spread: float, dtype=torch.float32):
    """Return gain and linear factor, both far from mean zero, and the parameters that they depend on."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, TOKENS, WIDTH, generator=generator, dtype=dtype)
    parameters = torch.tensor([0.4, spread], dtype=dtype, requires_grad=True)
    gain = noise[0] + 0.7 * noise[2, :, :1]  # not as many directions as outputs
    return 2 + parameters[0] * gain, -3 + parameters[1] * (noise[1] + 0.5 * noise[0]), parameters


def measured(one, gain, linear, counted, loss=1.0, rows=slice(None)):
    """Measure tokens whose outputs are all wrong by a constant: the FVU of the step is `FVU`."""
    target = TARGET[rows]
    error = FVU**0.5 * torch.ones_like(target)
    return one.measure((gain, linear), STRENGTH[rows].unsqueeze(-1), target + error, target, torch.tensor(loss), counted)


def settled(gain, linear, loss=2.0, pieces=((0, TOKENS),), weight=0.5, counted=COUNTED):
    """Return the balance term of a step, summed over pieces, as the training does. The first step measures the shift."""
    one = Balance(WIDTH, weight, lambda tensor: tensor, CPU)
    for _ in range(2):
        parts = [measured(one, gain[a:b], linear[a:b], counted[a:b], loss, slice(a, b)) for a, b in pieces]
        for part in parts:
            one.add(part)
        one.settle()
        terms = [one.of(part) for part in parts]
    return torch.stack(terms).sum()


def exact(gain, linear, loss=2.0, weight=0.5):
    """Return the term by its definition, from covariances that autograd can follow."""
    g, u = gain[COUNTED].double(), linear[COUNTED].double()
    features = g, u, g * u, STRENGTH[COUNTED].double().unsqueeze(-1) * u
    means = torch.stack([feature.mean(0) for feature in features])
    g, u, y, v = (feature - mean for feature, mean in zip(features, means, strict=True))
    zero = torch.zeros(4, WIDTH, dtype=torch.float64)
    pairs = [(a * b).mean(0) for a, b in ((g, g), (u, u), (y, y), (v, v), (g, u), (g, y), (u, y), (u, v), (v, y))]
    pairs_2OO = torch.stack([g.T @ g, y.T @ y]) / len(g)
    return weight * loss * balance.shortfall(torch.stack([*zero, *pairs]), pairs_2OO, means, torch.tensor(FVU))


def participation(rows) -> float:
    values = torch.linalg.eigvalsh(torch.cov(rows.T, correction=0))
    return (values.sum().square() / values.square().sum()).item()


@pytest.mark.parametrize("spread", [0.02, 0.4, 2.0])
def test_the_shares_are_those_of_the_evaluation(spread, monkeypatch):
    floors = {**FLOORS, "directions": 2.0}
    monkeypatch.setattr(balance, "CONSTANT", 0.0)
    monkeypatch.setattr(balance, "FLOORS", floors)
    floors = {**floors, "gate": balance.EASY["gate"] - FVU, "identity": balance.EASY["identity"] - FVU}
    gain, linear, _ = factors(spread, torch.float64)
    moments = Moments(dense_path=False)
    moments.add({"g": gain, "u": linear, "v": STRENGTH.double().unsqueeze(-1) * linear, "y": gain * linear})
    reference, _ = shares(moments)
    g, u, y, v = gain, linear, gain * linear, STRENGTH.double().unsqueeze(-1) * linear
    found = {name: reference[f"{name}_share"] for name in FLOORS if name != "directions"}
    found["directions"] = participation(g * u.square().mean(0).sqrt()) / participation(y)
    below = [max(0.0, floors[name] - found[name]) for name in floors]
    expected = sum(one - balance.RAMP / 2 if one > balance.RAMP else one**2 / (2 * balance.RAMP) for one in below)
    terms = g, u, y, v, g * g, u * u, y * y, v * v, g * u, g * y, u * y, u * v, v * y
    moments, pairs = torch.stack([term.mean(0) for term in terms]), torch.stack([g.T @ g, y.T @ y]) / TOKENS
    zero = torch.zeros(4, WIDTH, dtype=torch.float64)
    assert balance.shortfall(moments, pairs, zero, torch.tensor(FVU)).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("spread", [0.02, 0.4])
@pytest.mark.parametrize("directions", [0.0, 2.0])
def test_its_gradient_is_that_of_the_shortfall(spread, directions, monkeypatch):
    monkeypatch.setattr(balance, "FLOORS", {**FLOORS, "directions": directions})
    gain, linear, parameters = factors(spread)
    (found,) = torch.autograd.grad(settled(gain, linear), parameters)
    gain, linear, parameters = factors(spread)
    (expected,) = torch.autograd.grad(exact(gain, linear), parameters)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-5)


def test_its_gradients_add_up_over_the_pieces_of_a_step(monkeypatch):
    monkeypatch.setattr(balance, "FLOORS", {**FLOORS, "directions": 2.0})
    whole, parts = factors(0.1), factors(0.1)
    (expected,) = torch.autograd.grad(settled(*whole[:2]), whole[2])
    (found,) = torch.autograd.grad(settled(*parts[:2], pieces=((0, 100), (100, 130), (130, TOKENS))), parts[2])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_it_is_zero_above_the_floors_and_without_tokens():
    gain, linear, _ = factors(3.0)
    assert settled(gain - 2, linear + 3).item() == 0.0
    nobody = torch.zeros(TOKENS, dtype=torch.bool)
    one = Balance(WIDTH, 1.0, lambda tensor: tensor, CPU)
    for _ in range(2):
        moments = measured(one, gain, linear, nobody)
        one.add(moments)
        one.settle()
    assert one.of(moments).isfinite()


def test_a_constant_linear_factor_gives_finite_gradients():
    """An MxD with `init: tokens` begins with u = 1."""
    gain, _, parameters = factors(0.1)
    linear = torch.ones_like(gain) + 0.0 * parameters[1]
    assert torch.autograd.grad(settled(gain, linear), parameters)[0].isfinite().all()


def test_attention_sinks_have_no_part_in_it(source):
    """With `mask: none` the loss counts BOS tokens and first positions, whose outputs can be a hundred times as large as others'."""
    here = source(steps=8, mask="none")
    activations = Activations(here, CPU)
    batches = [activations.batch(step) for step in range(8)]
    assert all(batch.counted_B.all() for batch in batches)
    left_out = sum((~batch.figures_B).sum().item() for batch in batches)
    assert left_out >= 8 * here.rows_a_step
    masked = Activations(source(steps=8, mask="bos"), CPU)
    assert left_out == sum((~masked.batch(step).counted_B).sum().item() for step in range(8))


BALANCED = {"skip": True, "shared_expert": True, "hidden": 36}


def balanced(models, text, folder, layer=BALANCED, **train):
    """Return a recipe whose layers have a shared expert and a skip path, both initialised from tokens."""
    settings = {"layers": [0, 1], "train": {"init": "tokens", "lr": 1e-2, "joint": 0.3, **train}, "data": {"tokens": 24_576}}
    recipe = small_recipe(models["llama"], text, folder, **settings)
    recipe["layer"] |= layer
    return recipe


def reached(layer) -> dict[str, float]:
    """Return the figures of a report that have floors."""
    shares = {name.removesuffix("_share"): value for name, value in layer.items() if name.endswith("_share")}
    return {**shares, "directions": layer["gain_dimensions"] / layer["output_dimensions"]}


def test_training_with_it_raises_the_shares_that_are_too_low(models, text, tmp_path):
    lowest = {}
    for weight in (0.0, 2.0):
        result = mxd_convert.convert(balanced(models, text, tmp_path / str(weight), balance=weight), quiet=True)
        layers = result.report["reliance"]["layers"].values()
        lowest[weight] = [min(reached(layer)[name] / floor for name, floor in FLOORS.items()) for layer in layers]
    assert max(lowest[0.0]) < 0.7
    assert all(after > before for before, after in zip(lowest[0.0], lowest[2.0], strict=True))


@pytest.mark.parametrize(("step", "stage"), [(33, Stage), (11, JointStage)])
def test_an_interrupted_run_with_it_ends_like_one_that_was_not(models, text, tmp_path, step, stage):
    settings = {"balance": 1.0, "jacobian": 0.1, "checkpoint_every": 8}
    whole = mxd_convert.convert(balanced(models, text, tmp_path / "whole", **settings), quiet=True)
    recipe = balanced(models, text, tmp_path / "stopped", **settings)
    interrupted_run(recipe, step, stage)
    assert_the_same(whole, mxd_convert.convert(recipe, quiet=True))


def test_a_checkpoint_with_a_shared_expert_names_its_format(models, text, tmp_path):
    """Readers of version 2 would refuse the key, and layers without it are written as before."""
    versions = {}
    for shared in (True, False):
        layer = {**BALANCED, "shared_expert": shared}
        output = mxd_convert.convert(balanced(models, text, tmp_path / str(shared), layer), quiet=True).output
        mxd = json.loads((output / "config.json").read_text())["mxd"]
        versions[shared] = mxd["format_version"], {"shared_expert" in entry for entry in mxd["layers"].values()}
    assert versions == {True: (3, {True}), False: (1, {False})}


def test_the_card_states_what_the_layers_were_trained_for(models, text, tmp_path):
    for weight, shared in ((0.5, True), (0.0, False)):
        layer = {**BALANCED, "skip": False, "shared_expert": shared}
        recipe = balanced(models, text, tmp_path / str(shared), layer, balance=weight, jacobian=weight)
        card = (mxd_convert.convert(recipe, quiet=True).output / "README.md").read_text()
        assert f"`y = ({'c_0 + ' * shared}C^T a) * (D^T z) + b`" in card
        card = " ".join(card.split())
        assert f"with the gain `g = {'c_0 + ' * shared}C^T a`" in card
        for sentence in ("A shared expert, `c_0`", "A balance term (weight 0.50)", "were matched (weight 0.50)"):
            assert (sentence in card) == shared, sentence
        assert ("High shares are therefore no evidence on their own" in card) == shared
