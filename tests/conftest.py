"""Fixtures: tiny but real models of every family, their conversions, text on disk, the program, a Hub on loopback."""

import json
import os
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run in parallel
os.environ.setdefault("HF_ASSETS_CACHE", f"{tempfile.gettempdir()}/mxd-tests-assets-{os.getuid()}")  # not the user's own

import pytest
import torch
import yaml
from filelock import FileLock
from folders import content_hash
from hub_client import OTHERS, TOKEN, Clients
from hub_server import Hub
from onnx_exports import PARITY
from project import ROOT
from selection import group_of, is_full, unmatched
from small_runs import FAMILIES, documents, make_model, small_recipe
from xdist.scheduler import LoadScopeScheduling

from mxd_convert import cli
from mxd_convert.base_model.families import find_sites
from mxd_convert.base_model.load import load_base, load_tokenizer
from mxd_convert.data.blocks import prepare
from mxd_convert.recipe.schema import Base, Recipe
from mxd_convert.training.stream import Source

torch.set_num_threads(1)


class Scheduling(LoadScopeScheduling):
    """pytest-xdist's scheduler with our groups."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


@pytest.hookimpl(tryfirst=True, optionalhook=True)  # pytest may run without xdist
def pytest_xdist_make_scheduler(config, log):
    return Scheduling(config, log)


def pytest_collection_modifyitems(config, items):
    """Mark the tests that only `make test-all` runs. The longest test comes first, so that no worker waits for it at the end."""
    for item in items:
        if is_full(item.nodeid):
            item.add_marker(pytest.mark.full)
    if config.args == ["tests"] and (patterns := unmatched([item.nodeid for item in items])):
        raise pytest.UsageError(f"tests/support/selection.py: no test matches {', '.join(patterns)}")
    items.sort(key=lambda item: "tour_in_the_readme" not in item.nodeid)


def shared_folder() -> Path | None:
    for folder in (os.environ.get("MXD_SHARED"), ROOT.parent / "shared"):
        if folder and (Path(folder) / "models").is_dir():
            return Path(folder).resolve()
    return None


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = shared_folder()
    if folder is None:
        pytest.skip("needs the folder of models and data at ../shared or MXD_SHARED; neither exists")
    return folder


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Make a folder once for all workers: once("name", fill) calls fill(folder) unless a worker has done so, and returns it."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "once"
    shared.mkdir(exist_ok=True)
    used = {}

    def make(name: str, fill) -> Path:
        folder, made = shared / name, shared / f"{name}.made"
        with FileLock(shared / f"{name}.lock"):
            if not made.exists():
                fill(folder)
                made.write_text(content_hash(folder))
        used[folder] = made.read_text()
        return folder

    yield make
    for folder, content in used.items():
        assert content_hash(folder) == content, f"a test has changed {folder}, which all tests share"


@pytest.fixture(scope="session")
def models(once) -> dict[str, Path]:
    """Return a random model of each family."""
    return {family: once(f"tiny-{family}", partial(make_model, family)) for family in FAMILIES}


@pytest.fixture(scope="session", params=FAMILIES)
def base(request, models):
    """Load a base model of each family in turn."""
    return load_base(Base(model=str(models[request.param])))


@pytest.fixture(scope="session")
def source(models, text, tmp_path_factory):
    """Return a function that makes a source of activations: two layers of a tiny Llama, 8 steps of 4 blocks, 3 steps per buffer."""
    recipe = Recipe(**{key: value for key, value in small_recipe(models["llama"], text, text.parent).items() if key != "output"})
    blocks, _ = prepare(recipe.data, load_tokenizer(recipe.base.model), tmp_path_factory.mktemp("data"))
    base = load_base(recipe.base)

    def make(**changes):
        settings = {
            "base": base,
            "sites": find_sites(base, base.config, [0, 2]),
            "blocks": blocks,
            "rows_a_step": 4,
            "steps": 8,
            "buffer_steps": 3,
            "seed": 5,
            "mask": "bos",
            "below": {},
            "teacher": False,
        }
        return Source(**{**settings, **changes})

    return make


@pytest.fixture(scope="session")
def text(once) -> Path:
    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents()))

    return once("text", write) / "text.jsonl"


@pytest.fixture(scope="session")
def converted(models, text, once) -> dict[str, Path]:
    """Convert layers 0 and 2 of three in a model of each family."""
    from mxd_convert import convert

    def make(family: str) -> Path:
        return once(
            f"converted-{family}",
            lambda output: convert(small_recipe(models[family], text, output, layers=[0, 2]), quiet=True),
        )

    return {family: make(family) for family in FAMILIES}  # now, because a test may patch something later


@pytest.fixture(scope="session")
def stories(shared, once):
    """Convert all five layers of the real 260K story model on a tenth of the recipe's tokens."""
    from mxd_convert import convert

    overrides = {
        "base.model": str(shared / "models" / "stories260K"),
        "data.train.path": str(shared / "data" / "stories.jsonl.gz"),
    }
    overrides |= {
        "data.tokens": 61_440,
        "data.eval.tokens": 8192,
        "train.batch_tokens": 512,
        "train.log_every": 20,
    }
    output = once("stories", lambda output: convert("stories260k", output, overrides, quiet=True))
    return convert("stories260k", output, overrides, quiet=True)  # there already


@pytest.fixture(scope="session")
def quick(once):
    """Convert the quickstart on a third of its tokens, without its dense twin."""
    from mxd_convert import convert

    overrides = {"data.tokens": 61_440, "data.eval.tokens": 4096, "train.twin": False}
    output = once("quickstart", lambda output: convert("quickstart", output, overrides, quiet=True))
    return convert("quickstart", output, overrides, quiet=True)  # there already


@pytest.fixture(scope="session", autouse=True)
def brief_parity():
    from mxd_convert.onnx import parity

    assert {name: getattr(parity, name) for name in PARITY} == PARITY
    with mock.patch.multiple(parity, PROMPTS=4, NEW_TOKENS=16):
        yield


@pytest.fixture(scope="session")
def exported(converted, text, once) -> dict[str, Path]:
    """Export every family in float32, with experts and steering."""
    from mxd_convert.commands.export_onnx import export_onnx

    def export(family: str, output: Path) -> None:
        done = export_onnx(converted[family], output, expert_outputs=True, steering=True, data=text, tokens=512, quiet=True)
        assert done.failures == []

    return {family: once(f"exported-{family}", partial(export, family)) for family in FAMILIES}


@pytest.fixture
def mxd(monkeypatch, capsys):
    """Run the program in this process: mxd("plan", "r.yaml") returns (exit status, stdout, stderr)."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mxd-convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


@pytest.fixture
def refused(mxd):
    """Run the program on bad input, check the form of its error and return it."""

    def run(*arguments, words: tuple[str, ...]) -> str:
        status, out, err = mxd(*arguments)
        assert status == 2, (status, err)
        assert out == ""
        assert "Traceback" not in err
        # progress may come first; the error is the last line or two
        message = err[err.index("mxd-convert: ") :]
        assert len(message.strip().splitlines()) <= 2, message
        for word in words:
            assert word in message, message
        return message

    return run


@pytest.fixture(scope="session")
def hub():
    """Start a Hub on loopback; alice and bob may write to their own repositories."""
    with Hub({TOKEN: "alice", OTHERS: "bob"}).running() as running:
        yield running
        assert not running.leaks  # the token is sent to the Hub only


@pytest.fixture(scope="session")
def programs(hub, tmp_path_factory):
    """Start the program and scripts in processes of their own that know the Hub on loopback."""
    home = tmp_path_factory.mktemp("programs")
    yield Clients(hub.url, home)
    for file in home.rglob("*"):  # caches, output and messages
        if file.is_file():
            assert TOKEN.encode() not in file.read_bytes(), file


@pytest.fixture
def program(programs, hub, tmp_path):
    """Run the program as alice, with the Hub on loopback. It never prints a traceback or the token."""

    def run(*arguments, token=TOKEN, **options):
        done = programs.run(*arguments, token=token, **options)
        assert "Traceback" not in done.err, done.err
        assert TOKEN not in done.out + done.err
        return done

    yield run
    hub.faults.clear()
    hub.watch = lambda request: None
    for file in tmp_path.rglob("*"):
        if file.is_file():
            assert TOKEN.encode() not in file.read_bytes(), file


@pytest.fixture
def program_refused(program):
    """Run the program as alice and expect exit status 2 and one or two lines with these words."""

    def run(*arguments, words, **options):
        done = program(*arguments, **options)
        assert done.status == 2, (done.status, done.err)
        message = done.err[done.err.index("mxd-convert: ") :]
        assert len(message.strip().splitlines()) <= 2, message
        for word in words:
            assert word in message, message
        return message

    return run


@pytest.fixture
def recipe(tmp_path, models, text):
    """Write a small recipe with changes; return its path."""

    def write(**sections) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(small_recipe(models["gpt2"], text, tmp_path / "out", **sections)))
        return path

    return write


@pytest.fixture
def copy(converted, tmp_path):
    """Copy a finished checkpoint, which the test may damage."""
    return Path(shutil.copytree(converted["llama"], tmp_path / "copy"))
