"""Several real processes over gloo share batches or layers, with the result of one process."""

import json
import shutil
import signal
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from comparisons import assert_same_weights
from processes import two_processes, wait_for_states
from safetensors.torch import load_file
from small_runs import small_recipe

import mxd_convert
from mxd_convert import convert
from mxd_convert.errors import InputError
from mxd_convert.training.distributed import connection_guard


def finish_in_two(recipe: Path, folder: Path) -> None:
    """Resume a run in two processes and wait for its end."""
    done = two_processes(recipe)
    _, errors = done.communicate(timeout=120)
    assert done.returncode == 0, errors
    assert json.loads((folder / "mxd_report.json").read_text())["cost"]["resumed_at_steps"]


@pytest.mark.parametrize("terms", [{}, {"balance": 0.5, "jacobian": 0.02}], ids=["plain", "balanced"])
def test_two_processes_train_the_layers_of_one_even_if_interrupted(models, text, tmp_path, terms):
    """Each of two processes takes half of every batch; the layers equal those of one process."""
    settings = {"layers": [0, 2], "data": {"tokens": 65_536}, "train": {"checkpoint_every": 3, "init": "tokens", **terms}}
    if terms:
        settings["layer"] = {"shared_expert": True}
    one = convert(small_recipe(models["gpt_neox"], text, tmp_path / "one", **settings), quiet=True)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small_recipe(models["gpt_neox"], text, tmp_path / "two", **settings)))
    cut = two_processes(recipe)
    wait_for_states(tmp_path / "two")
    cut.terminate()
    _, errors = cut.communicate(timeout=60)
    assert cut.returncode != 0
    assert errors.count("mxd-convert: interrupted") == errors.count("mxd-convert: ") == 1, errors
    assert not (tmp_path / "two").exists(), "the signal came too late to show anything"
    done = two_processes(recipe)
    output, errors = done.communicate(timeout=120)
    assert done.returncode == 0, errors
    assert "over 2 processes" in errors  # the world size of accelerate
    assert "resumed at step" in errors
    assert output.count("verdict") == 1
    ours, theirs = load_file(tmp_path / "two" / "model.safetensors"), load_file(one.output / "model.safetensors")
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=1e-3), name
    logs = [[json.loads(line) for line in (tmp_path / n / "training_log.jsonl").read_text().splitlines()] for n in ("one", "two")]
    for single, double in zip(*logs, strict=True):
        assert double["tokens"] == single["tokens"]
        for index, layer in single["layers"].items():
            for name in ("loss", "fvu"):
                assert double["layers"][index][name] == pytest.approx(layer[name], rel=1e-4), (single["step"], index)


def test_layers_distributed_over_two_processes_equal_those_of_one(models, text, tmp_path):
    settings = {"layers": "all", "data": {"tokens": 16_384}}
    one = convert(small_recipe(models["llama"], text, tmp_path / "one", **settings), quiet=True)
    settings["train"] = {"distribute": "layers", "tracker": "tensorboard"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small_recipe(models["llama"], text, tmp_path / "two", **settings)))
    done = two_processes(recipe)
    output, errors = done.communicate(timeout=120)
    assert done.returncode == 0, errors
    assert "over 2 processes" in errors
    assert output.count("verdict") == 1
    assert_same_weights(tmp_path / "two", one.output)
    logs = [[json.loads(line) for line in (tmp_path / n / "training_log.jsonl").read_text().splitlines()] for n in ("one", "two")]
    for single, double in zip(*logs, strict=True):
        assert double["layers"] == single["layers"]
        assert double["tokens_per_second"] > 0
    report = json.loads((tmp_path / "two" / "mxd_report.json").read_text())
    assert report["fidelity"] == one.report["fidelity"]
    logged = "".join(path.read_bytes().decode("latin1") for path in (tmp_path / "logs").rglob("events.out.tfevents.*"))
    assert all(f"layer_{index}/fvu" in logged for index in range(3))  # those of the other process too


def test_a_run_of_one_process_resumes_in_two_that_distribute_its_layers(programs, models, text, tmp_path):
    settings = {"layers": "all", "data": {"tokens": 65_536}, "train": {"checkpoint_every": 3}}
    one = convert(small_recipe(models["llama"], text, tmp_path / "one", **settings), quiet=True)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small_recipe(models["llama"], text, tmp_path / "two", **settings)))
    alone = programs.start("run", recipe)
    wait_for_states(tmp_path / "two")
    alone.send(signal.SIGKILL)
    assert alone.wait().status is None, "the kill came too late to show anything"
    settings["train"] = {**settings["train"], "distribute": "layers"}
    recipe.write_text(yaml.safe_dump(small_recipe(models["llama"], text, tmp_path / "two", **settings)))
    finish_in_two(recipe, tmp_path / "two")
    assert_same_weights(tmp_path / "two", one.output)


def test_distributed_layers_resume_after_a_kill(models, text, tmp_path):
    settings = {"layers": "all", "data": {"tokens": 65_536}, "train": {"distribute": "layers", "checkpoint_every": 3}}
    one = convert(small_recipe(models["llama"], text, tmp_path / "one", **settings), quiet=True)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small_recipe(models["llama"], text, tmp_path / "two", **settings)))
    cut = two_processes(recipe)
    wait_for_states(tmp_path / "two", 3)
    launcher = psutil.Process(cut.pid)
    for process in [*launcher.children(recursive=True), launcher]:
        process.kill()
    cut.communicate(timeout=60)
    assert not (tmp_path / "two").exists(), "the kill came too late to show anything"
    finish_in_two(recipe, tmp_path / "two")
    assert_same_weights(tmp_path / "two", one.output)


HOUSE = str(Path(mxd_convert.__file__).parent)  # torchrun prints its own traceback, which must not name our files


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train": {"lrr": 1}}, "train.lrr: unknown key"),
        pytest.param({"data": {"train": {"path": "{text}", "text": "txt"}}}, "no field 'txt'", marks=pytest.mark.slow),
        pytest.param({"output": {"dir": "{text}"}}, "is a file. Choose another output.dir", marks=pytest.mark.slow),
        ({"train": {"lr": 1e30}}, "the loss is not finite"),
        ({"train": {"lr": 1e30, "distribute": "layers"}, "layers": "all"}, "the loss is not finite"),
        ({"base": {"model": "{damaged}"}}, "is truncated or damaged"),
    ],
)
def test_an_error_is_reported_once_by_any_number_of_processes(models, text, tmp_path, change, words):
    damaged = Path(shutil.copytree(models["gpt_neox"], tmp_path / "damaged"))
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    settings = json.loads(json.dumps(change).replace("{text}", str(text)).replace("{damaged}", str(damaged)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small_recipe(models["gpt_neox"], text, tmp_path / "out", **settings)))
    done = two_processes(recipe)
    _, errors = done.communicate(timeout=120)
    assert done.returncode != 0
    assert errors.count("mxd-convert: ") == errors.count(words) == 1, errors
    assert HOUSE not in errors, errors
    work = tmp_path / "out.partial"
    assert not work.exists() or (work / "fingerprint").is_file()  # a later run recognises the work folder as its own


def test_a_killed_process_ends_the_others_with_one_line(models, text, tmp_path):
    settings = {"data": {"tokens": 2_000_000}, "train": {"checkpoint_every": 3}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small_recipe(models["gpt_neox"], text, tmp_path / "out", **settings)))
    run = two_processes(recipe)
    wait_for_states(tmp_path / "out")
    second = next(process for process in psutil.Process(run.pid).children() if process.environ().get("LOCAL_RANK") == "1")
    second.kill()
    _, errors = run.communicate(timeout=60)
    assert run.returncode != 0
    # one line, unless the launcher ended the other process first
    assert errors.count("mxd-convert: ") == errors.count("another process of this run exited early") <= 1, errors
    assert HOUSE not in errors, errors


def test_connection_errors_are_a_one_line_error():
    with (
        pytest.raises(InputError, match=r"another process of this run exited early \(.*closed by peer.*same command"),
        connection_guard(2),
    ):
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242\nand more")
    with pytest.raises(RuntimeError, match="shapes"), connection_guard(2):
        raise RuntimeError("shapes do not fit")
