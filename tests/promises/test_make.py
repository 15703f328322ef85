"""The promise: `make real` converts a model that people use, on the shared text or on text that the model writes itself."""

import itertools
import os
import shlex
import subprocess
from pathlib import Path

from project import ROOT

from mxd_convert.recipe.load import load_recipe, parse_overrides
from mxd_convert.recipe.schema import Recipe


def printed(shared: Path, folder: Path, *variables: str) -> str:
    """Return the commands of `make real`, which are not run. folder: of the downloaded model and the sampled text."""
    command = ["make", "--dry-run", "real", f"REAL={folder}", *variables]
    environment = {**os.environ, "MXD_SHARED": str(shared)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


def recipe_of(commands: str) -> Recipe:
    """Return the recipe that the `run` among some commands resolves to."""
    [line] = [line for line in commands.replace("\\\n", " ").splitlines() if "mxd-convert run" in line]
    words = shlex.split(line)
    changes = [after for word, after in itertools.pairwise(words) if word == "--set"]
    return load_recipe(str(ROOT / words[2]), parse_overrides(changes))


def test_the_shared_text_is_used_where_it_is_there(tmp_path):
    prose = tmp_path / "shared" / "data" / "prose.jsonl.gz"
    prose.parent.mkdir(parents=True)
    prose.touch()
    commands = printed(tmp_path / "shared", tmp_path)
    recipe = recipe_of(commands)
    assert "mxd-convert sample" not in commands
    assert (recipe.data.train.path, recipe.data.train.text, recipe.data.train.sources) == (str(prose), "text", None)
    assert recipe.base.gguf_file == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert (recipe.layers, recipe.train.joint) == (15, 0.0)
    whole = recipe_of(printed(tmp_path / "shared", tmp_path, "LAYERS=all"))
    assert (whole.layers, whole.train.joint, whole.data.tokens) == ("all", None, 1_000_000)


def test_the_model_writes_its_text_where_there_is_none(tmp_path):
    commands = printed(tmp_path / "nothing", tmp_path)
    recipe = recipe_of(commands)
    assert commands.index("pip install") < commands.index("mxd-convert sample") < commands.index("mxd-convert run")
    assert (recipe.data.train.path, recipe.data.train.text) == (str(tmp_path / "chats-80000.jsonl"), "messages")
