"""A resumed run notices damage and changes in every file that it reads, and no finished result is lost."""

import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from comparisons import assert_the_same
from interruptions import interrupted_run
from small_runs import small_recipe

from mxd_convert import Result, convert, load_recipe, make_plan, sweep
from mxd_convert.base_model.load import load_tokenizer
from mxd_convert.checkpoint.workspace import Workspace
from mxd_convert.data.blocks import prepare
from mxd_convert.errors import InputError
from mxd_convert.training.joint import JointStage

SETTINGS = {"layers": [0, 2], "train": {"joint": 0.5, "checkpoint_every": 3}, "data": {"eval": {"tokens": 256}}}


@pytest.fixture(scope="module")
def whole(models, text, tmp_path_factory) -> Result:
    return convert(small_recipe(models["gpt2"], text, tmp_path_factory.mktemp("whole") / "out", **SETTINGS), quiet=True)


@pytest.fixture(scope="module")
def interrupted(models, text, tmp_path_factory) -> tuple[dict, Path]:
    """Return the recipe of a run that was interrupted in its joint stage, and a copy of its work folder."""
    folder = tmp_path_factory.mktemp("unfinished")
    recipe = small_recipe(models["gpt2"], text, folder / "out", **SETTINGS)
    interrupted_run(recipe, 4, JointStage)
    return recipe, (folder / "out.partial").rename(folder / "kept")


def flip(content: bytes, seed: str) -> bytes:
    draw = random.Random(seed)
    at = draw.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]


def garbage(content: bytes, seed: str) -> bytes:
    return b"\xff\x00[[{" + content[7 : len(content) // 2]


@pytest.mark.parametrize("damage", [flip, pytest.param(garbage, marks=pytest.mark.slow)])
def test_a_damaged_file_changes_nothing_or_is_a_one_line_error(interrupted, whole, damage):
    recipe, kept = interrupted
    output, work = Path(recipe["output"]["dir"]), Path(recipe["output"]["dir"] + ".partial")
    names = [file.relative_to(kept) for file in sorted(kept.rglob("*")) if file.is_file() and file.stat().st_size]
    assert len(names) == 15  # the mark, four of the text, and per stage two states of two files each and a log
    resumed, errors = 0, {}
    for name in names:
        for folder in (output, work):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(kept, work)
        (work / name).write_bytes(damage((work / name).read_bytes(), str(name)))
        try:
            done = convert(recipe, quiet=True)
        except InputError as error:
            errors[name.name] = str(error)
            continue
        assert_the_same(done, whole)
        assert done.report["fidelity"] == whole.report["fidelity"]
        resumed += bool(done.report["cost"]["resumed_at_steps"])
    assert list(errors) == ["fingerprint"]  # every other file can be made again
    assert "--fresh" in errors["fingerprint"]
    assert "\n" not in errors["fingerprint"]
    assert resumed == len(names) - 1


@pytest.mark.parametrize("damage", ["no mark", "a mark that is garbage", "a folder for a mark", "no notes", "nothing whole"])
def test_fresh_begins_again_after_any_damage(interrupted, whole, damage):
    recipe, kept = interrupted
    output, work = Path(recipe["output"]["dir"]), Path(recipe["output"]["dir"] + ".partial")
    for folder in (output, work):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(kept, work)
    if "mark" in damage:
        (work / "fingerprint").unlink()
    if damage == "a folder for a mark":
        (work / "fingerprint").mkdir()
    if damage == "a mark that is garbage":
        (work / "fingerprint").write_bytes(b"\xff")
    for file in work.rglob("*.json" if damage == "no notes" else "*" if damage == "nothing whole" else "?"):
        if file.is_file():
            file.write_bytes(b"{}")
    if damage != "no notes":  # notes can be made again
        with pytest.raises(
            InputError, match=r"whose file 'fingerprint' is missing, damaged or of another version\. Start over with --fresh"
        ):
            convert(recipe, quiet=True)
    assert_the_same(convert(recipe, fresh=damage != "no notes", quiet=True), whole)
    assert not work.exists()


@pytest.fixture
def own_recipe(models, text, tmp_path) -> dict:
    """Return a recipe whose base and texts the test may change."""
    base = Path(shutil.copytree(models["gpt2"], tmp_path / "base"))
    for name in ("README.md", ".hidden", "picture.PNG"):
        (base / name).write_text("not loaded")
    (tmp_path / "texts").mkdir()
    for number in range(2):
        shutil.copy(text, tmp_path / "texts" / f"{number}.jsonl")
    return small_recipe(base, tmp_path / "texts", tmp_path / "out", layers=[1])


def workspace_of(recipe: dict) -> Workspace:
    return Workspace(make_plan(load_recipe(recipe)).recipe, Path(recipe["output"]["dir"]), fresh=False)


@pytest.mark.parametrize(
    "name",
    ["base/tokenizer.json", "base/config.json", "base/model.safetensors", "base/vocab.txt", "texts/1.jsonl", "texts/2.jsonl"],
)
def test_a_changed_input_is_named(own_recipe, tmp_path, name):
    interrupted_run(own_recipe, 4)
    workspace, file = workspace_of(own_recipe), tmp_path / name
    before = file.read_bytes() if file.exists() else None
    for folder in ("base", "texts"):  # the same bytes, in another order of creation, are the same
        (tmp_path / folder).rename(tmp_path / "old")
        (tmp_path / folder).mkdir()
        for path in sorted((tmp_path / "old").iterdir(), reverse=True):
            (tmp_path / folder / path.name).write_bytes(path.read_bytes())
        shutil.rmtree(tmp_path / "old")
    for unread in ("README.md", ".hidden", "picture.PNG"):
        (tmp_path / "base" / unread).write_text("changed")
    workspace.claim()
    file.write_bytes(b"{}" if before is None else flip(before, name))
    words = "was added" if before is None else "has changed"
    with pytest.raises(InputError, match=rf"{file} {words} since it began\. Undo that change, start over with --fresh"):
        workspace.claim()
    file.unlink()
    if before is not None:
        with pytest.raises(InputError, match=rf"{file} was removed"):
            workspace.claim()
        file.write_bytes(before)
    workspace.claim()
    assert workspace.has_state()


def test_text_that_is_read_again_must_be_the_same(own_recipe, tmp_path):
    recipe, lines = load_recipe(own_recipe), []
    tokenizer, folder = load_tokenizer(recipe.base.model), tmp_path / "data"
    train, _ = prepare(recipe.data, tokenizer, folder, lines.append)
    ids, info = train.ids.copy(), train.info
    for name in ("train.tokens", "eval.tokens", "eval.starts", "data.json"):
        lines.clear()
        (folder / name).write_bytes(flip((folder / name).read_bytes(), name))
        again, _ = prepare(recipe.data, tokenizer, folder, lines.append)
        assert (again.ids == ids).all()
        assert again.info == info
        assert lines[0] == f"data/{name} is damaged. Reading the text again."
    whole = (tmp_path / "texts" / "0.jsonl").read_text()
    (tmp_path / "texts" / "0.jsonl").write_text(whole.upper().replace('"TEXT"', '"text"'))
    prepare(recipe.data, tokenizer, folder)  # intact files are not read again
    (folder / "data.json").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(InputError, match=r"data: texts: .* is damaged, and the text no longer gives the tokens"):
            prepare(recipe.data, tokenizer, folder)
    (tmp_path / "texts" / "0.jsonl").write_text(whole)
    assert (prepare(recipe.data, tokenizer, folder)[0].ids == ids).all()


def in_a_child(work) -> int:
    """Run a function in a child process that it may end; return the exit status."""
    if (child := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("renames", [1, 2])
def test_a_kill_while_a_result_is_replaced_loses_neither(own_recipe, tmp_path, monkeypatch, renames):
    old, kept = convert(own_recipe, quiet=True), tmp_path / "kept"
    shutil.copytree(old.output, kept)
    stamp, rename = (old.output / "model.safetensors").stat().st_mtime_ns, Path.rename
    seen = []

    def killed(path, target):
        made = rename(path, target)
        seen.append(path.name)
        if len([name for name in seen if name in ("out", "checkpoint")]) == renames:
            os._exit(9)
        return made

    def work():
        monkeypatch.setattr(Path, "rename", killed)
        convert(own_recipe, fresh=True, quiet=True)

    assert in_a_child(work) == 9
    assert old.output.exists() == (renames == 2)
    with workspace_of(own_recipe).locked():
        workspace_of(own_recipe).claim()
    assert ((old.output / "model.safetensors").stat().st_mtime_ns == stamp) == (renames == 1)
    done = convert(own_recipe, quiet=True)
    assert_the_same(done, replace(old, output=kept))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "kept", "out", "texts"]


def test_the_next_call_restores_an_older_result(own_recipe, tmp_path):
    workspace = workspace_of(own_recipe)
    (workspace.folder / "aside" / "old").mkdir(parents=True)
    (workspace.folder / "aside" / "old" / "config.json").write_text("older")
    workspace.remove_if_untrained()
    assert (workspace.output / "config.json").read_text() == "older"
    assert not workspace.folder.exists()


def test_a_resumed_run_removes_leftovers_of_a_kill(interrupted):
    recipe, kept = interrupted
    work = Path(recipe["output"]["dir"] + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(kept, work)
    left = [work / "state" / "joint" / ".step-000000009.json-abcdef.1.x.tmp", work / "old.tmp", work / "offload" / "weight.dat"]
    for file in left:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    workspace_of(recipe).claim()
    assert sorted(work.rglob("*")) == sorted(work / path.relative_to(kept) for path in kept.rglob("*"))
    shutil.rmtree(work)


@pytest.mark.parametrize(("output", "words"), [("mounted", "mount point"), ("file", "is a file"), ("/", "no name of its own")])
def test_an_output_that_refuses_a_rename_is_refused_before_any_work(own_recipe, tmp_path, monkeypatch, output, words):
    (tmp_path / "mounted").mkdir()
    (tmp_path / "file").touch()
    ismount = os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "mounted" or ismount(path))
    monkeypatch.setattr("mxd_convert.commands.run.prepare", None)
    with pytest.raises(InputError, match=f"output.dir: .*{words}"):
        convert(own_recipe, tmp_path / output, quiet=True)
    assert not (tmp_path / f"{output}.partial").exists()


def test_a_sweep_refuses_another_text_and_a_damaged_mark(own_recipe, tmp_path, monkeypatch):
    grid, folder = {"layer.k": [2, 4]}, tmp_path / "sweep"
    with monkeypatch.context() as patched:
        patched.setattr("mxd_convert.commands.sweep.train_together", lambda jobs, quiet: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # once the text is tokenised
            sweep(own_recipe, grid, folder, quiet=True)
    (tmp_path / "texts" / "0.jsonl").unlink()
    done = sweep(own_recipe, grid, folder, quiet=True)
    report = folder / "runs" / "k-2" / "mxd_report.json"
    content = json.loads(report.read_text())
    assert content["data"]["train"] == convert(own_recipe, tmp_path / "alone", quiet=True).report["data"]["train"]
    content["fidelity"]["delta_ce"] += 1.0
    report.write_text(json.dumps(content))
    assert sweep(own_recipe, grid, folder, quiet=True).rows == done.rows
    mark = folder / "sweep.mark"
    mark.write_bytes(flip(mark.read_bytes(), "mark"))
    with pytest.raises(InputError, match=r"sweep.mark: .*--fresh"):
        sweep(own_recipe, grid, folder, quiet=True)
    assert len(sweep(own_recipe, grid, folder, fresh=True, quiet=True).rows) == 2
