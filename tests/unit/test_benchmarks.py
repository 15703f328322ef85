"""The benchmarks run at sizes of seconds, and their comparisons are right. Their figures belong in benchmarks/RESULTS.md."""

import sys

import pytest
from project import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import dashboard
import inference
import steps
import study
import torch
import train_step
from torch.utils.flop_counter import FlopCounterMode

from mxd_convert.recipe.load import load_recipe
from mxd_convert.recipe.presets import resolve_layer, resolve_train

SMALL = steps.Shape(24, 40, 24, 200, 4, 64, "gelu_new")


@pytest.mark.parametrize("kind", steps.KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_kind_of_step_computes_all_its_products(kind, precision):
    make = {"dense": steps.dense, "ours": steps.ours, "floor": steps.floor}[kind]
    step = make(SMALL, torch.device("cpu"), precision)
    step()
    with FlopCounterMode(display=False) as work:
        step()
    gate, linear = 2 * SMALL.batch * SMALL.d_in * SMALL.n_experts, 2 * SMALL.batch * SMALL.d_hidden * (SMALL.d_in + SMALL.d_out)
    # torch does not count the products of linear layers under autocast
    assert work.get_total_flops() >= gate + (linear if precision == "fp32" else 0)


def test_the_dense_step_trains_the_same_layer(monkeypatch):
    """From the same initialisation, the dense step of the comparison trains the same weights."""
    made = []
    new = steps.new_layer
    monkeypatch.setattr(steps, "new_layer", lambda shape, device: made.append(new(shape, device)) or made[-1])
    for kind in (steps.dense, steps.ours):
        step = kind(SMALL, torch.device("cpu"), "fp32")
        for _ in range(20):
            step()
    theirs, ours = made
    for name in ("encoder.weight", "decoder.weight", "gate.weight", "output_bias"):
        assert torch.allclose(theirs.get_parameter(name), ours.get_parameter(name), atol=1e-5), name
    assert not torch.allclose(new(SMALL, torch.device("cpu")).gate.weight, ours.gate.weight, atol=2e-4)


def test_a_ratio_is_that_of_the_medians():
    text = train_step.ratio([4.0, 4.0, 8.0], [2.0, 2.0, 1.0])
    assert text.startswith("2.00 (")


@pytest.mark.parametrize("arm", study.ARMS)
@pytest.mark.parametrize("model", study.MODELS)
def test_every_arm_of_the_study_is_a_valid_recipe(monkeypatch, arm, model):
    monkeypatch.setenv("MXD_SHARED", "/nowhere")
    recipe = load_recipe(model, study.Case(model, arm, 8, 5e-3, 2, 300_000).settings())
    train = resolve_train(resolve_layer(recipe, 172), 64, 1780).train
    published = arm == "MxD, paper"
    assert (train.init, train.k_init) == (("paper", 8) if published else ("tokens", 32))
    schedule, batch = ("constant", 4096) if published else ("trapezoid", 256)
    assert (train.lr, train.seed, train.schedule, train.batch_tokens, recipe.data.tokens) == (5e-3, 2, schedule, batch, 300_000)
    assert train.joint == (0.0 if published else 0.4)
    assert train.balance == (0.75 if arm == "MxD" else 0.0)


def test_the_earlier_preset_is_one_of_the_arms():
    settings = study.Case("stories260k", "MxD, fast before", 8, 1e-2, 0, 600_000).settings()
    expected = {"layer.hidden": 43, "layer.shared_expert": False, "train.jacobian": 0.0, "train.joint_lr": 2e-3}
    assert expected.items() <= settings.items()


@pytest.fixture
def measured(monkeypatch):
    """Replace the study's training by made-up figures; return the cases it ran."""
    measured = []

    def measure(case):
        measured.append(case)
        layers = {"gate_share": [0.9, 0.8], "hidden_share": [0.4, 0.5], "product_share": [0.1, 0.2], "expert_share": [0.9, 0.8]}
        layers |= {"routing_necessity": [1.5, None], "fvu": [0.1, 0.2], "jacobian_error": [0.3, 0.4]}
        # the rate that is best on held-out text is not the one that is best on the training text
        left = {"train_fvu": case.lr, "train_kl": abs(case.lr - 1e-2)}
        if "paper" in case.arm:  # without a joint stage there is no KL
            left = {"train_fvu": left["train_kl"], "train_kl": None}
        return {"rise": case.seed + case.lr, "rise_se": 0.2, **left, **layers, "verdict": "mixture of decoders"}

    monkeypatch.setattr(study, "measure", measure)
    return measured


def test_a_budget_curve_uses_the_rates_of_the_first_budget(measured, monkeypatch, tmp_path, capsys):
    arguments = "--models stories260k --arms MxD dense_twin --k 8 4 --tokens 600 300 --seeds 0 1 --rates 5e-3 1e-2 --jobs 1"
    picture = tmp_path / "images" / "curve.png"
    given = [word.replace("_", " ") for word in arguments.split()]
    monkeypatch.setattr("sys.argv", ["study.py", *given, "--plot", str(picture), "--results", str(tmp_path / "study.jsonl")])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    study.main()
    searched = [(case.arm, case.lr) for case in measured[:4]]
    assert searched == [("MxD", 5e-3), ("MxD", 1e-2), ("dense twin", 5e-3), ("dense twin", 1e-2)]
    assert all((case.k, case.seed, case.tokens) == (8, 0, 600) for case in measured[:4])
    assert {case.lr for case in measured[4:]} == {1e-2}
    assert len(measured) == 4 + 2 * (4 + 2) - 2  # two of the searched rates are in the tables too
    assert capsys.readouterr().out.count("| MxD | 2 | 4 | 0.01 |") == 2
    assert picture.stat().st_size > 10_000


def test_a_study_with_known_results_runs_nothing(measured, monkeypatch, tmp_path, capsys):
    path = tmp_path / "study.jsonl"
    results = study.Results(path)
    for arm, k in (("MxD", 8), ("MxD", 4), ("MxD, paper", 4)):  # no rate is known for the last case
        results.of(study.Case("stories260k", arm, k, 1e-2, 0, 600))
    measured.clear()
    arguments = f"--models stories260k --tokens 600 300 --jobs 1 --known --results {path} --plot {tmp_path / 'known.png'}"
    monkeypatch.setattr("sys.argv", ["study.py", *arguments.split()])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    study.main()
    assert measured == []
    printed = capsys.readouterr().out
    assert printed.count("| MxD | 1 | 8 |") == printed.count("| MxD | 1 | 4 |") == 1
    assert "- MxD: 0.01, the only one tried" in printed
    assert "| MxD | 1 | 32 |" not in printed
    assert "| MxD, paper |" not in printed
    assert (tmp_path / "known.png").stat().st_size > 10_000


def test_the_study_chooses_rates_by_the_training_text_and_continues(measured, tmp_path):
    path = tmp_path / "study.jsonl"
    for _ in range(2):
        results = study.Results(path)
        for arm in ("MxD", "MxD, paper"):
            cases = [study.Case("prose-neox", arm, 8, lr, 0, 1000) for lr in (5e-3, 1e-2, 2e-2)]
            for case in cases:
                results.of(case)
            assert study.best_rate(results, cases) == 1e-2
        seeds = [study.Case("prose-neox", "MxD", 8, 1e-2, seed, 1000) for seed in (0, 2)]
        row = study.table(results, [seeds]).splitlines()[-1]
    figures = "0.10 to 0.20 | 0.30 to 0.40 | 0.80 to 0.90 | 0.40 to 0.50 | 0.10 to 0.20 | 0.80 to 0.90 | 1.50 to 1.50"
    assert row == f"| MxD | 2 | 8 | 0.01 | 1.010 ± 1.000 (0.010 to 2.010) | {figures} | mixture of decoders |"
    assert "| 0.010 ± 0.200 |" in study.table(results, [seeds[:1]])
    assert len(measured) == 7  # the second time, the file holds every result


def test_an_interrupted_study_resumes_from_its_file(measured, tmp_path):
    path = tmp_path / "study.jsonl"
    cases = [study.Case("prose-neox", "MxD", 8, 1e-2, seed, 1000) for seed in (0, 1, 2)]
    for case in cases[:2]:
        study.Results(path).of(case)
    whole = path.read_text()
    for cut in (len(whole) - 1, len(whole) // 2 + 9, 5):
        path.write_text(whole[:cut])
        results = study.Results(path)
        assert set(results.figures) == set(cases[: whole[:cut].count("\n")])
        for case in cases:
            results.of(case)
        assert set(study.Results(path).figures) == set(cases)


def test_a_best_rate_at_the_edge_of_the_grid_is_reported():
    assert study.of_rates(1e-2, [2e-2, 5e-3, 1e-2]) == "0.01, of 0.005 0.01 0.02"
    assert study.of_rates(2e-2, [2e-2, 5e-3, 1e-2]) == "0.02, of 0.005 0.01 0.02, the highest"
    assert study.of_rates(5e-3, [2e-2, 5e-3]) == "0.005, of 0.005 0.02, the lowest"


def test_the_dashboard_benchmark_measures_files_and_memory(tmp_path):
    """A process writes the dashboard of a small layer and reports its memory."""
    folder = dashboard.checkpoint(tmp_path / "model", width=48, experts=200, k=4, vocabulary=2048)
    written = dashboard.write(folder, tmp_path / "board", 1024)
    assert written.files == 6 + 4 + 4  # pages and assets; summary, tokens, text and index; experts by 64
    assert written.disk_bytes == sum(path.stat().st_size for path in (tmp_path / "board").rglob("*") if path.is_file())
    assert 2**27 < written.peak_bytes < 2**32


@pytest.mark.slow
def test_the_inference_benchmark_runs_every_variant(tmp_path, capsys):
    """Every variant of a tiny model runs in its process; the bytes read per token are counted by hand."""
    found = inference.measure("tiny", tmp_path, rounds=1, threads=1)
    inference.show("tiny", found)
    table = capsys.readouterr().out
    for title in inference.VARIANTS.values():
        assert f"| {title} |" in table
    width, layers, hidden, vocabulary, experts, k = 32, 2, 128, 300, 64, 4
    attention = 4 * width * width + 4 * width
    norms = 2 * 2 * width
    mlp = 2 * width * hidden + hidden + width
    shared = layers * (attention + norms) + 2 * width + width * vocabulary + width  # the last is one row of positions
    gate_and_linear = width * experts + experts + 2 * width * hidden + hidden + width
    assert found["bytes"]["base"] == 4 * (shared + layers * mlp)
    assert found["bytes"]["dense"] == 4 * (shared + layers * (gate_and_linear + experts * width))
    assert found["bytes"]["mxd"] == found["bytes"]["fp32"] == 4 * (shared + layers * (gate_and_linear + k * width))
    assert found["bytes"]["fp16"] * 2 == found["bytes"]["fp32"]
    assert all(peak > 2**20 for peak in found["peak"].values())
    assert found["peak"]["fp32"] < found["peak"]["mxd"]
