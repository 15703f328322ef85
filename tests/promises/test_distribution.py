"""The wheel of `make dist` installs and converts the quickstart model without a checkout."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest
from project import ROOT


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Build wheel and source distribution; return their folder."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def test_the_wheel_converts_the_quickstart_in_an_empty_environment(dist, tmp_path):
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    (wheel,) = dist.glob("*.whl")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    # the dependencies, without the checkout installed beside them: .pth files of a folder that a .pth file adds are ignored
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = subprocess.run(
        [python, "-c", "import mxd_convert; print(mxd_convert.__file__)"],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(site)
    settings = ["--set", "data.tokens=8192", "--set", "data.eval.tokens=1024", "--set", "output.dashboard=true"]
    done = subprocess.run(
        [environment / "bin" / "mxd-convert", "run", "quickstart", "--output", "made", "--json", *settings],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["report"]["fidelity"]["tokens"] > 0
    made = tmp_path / "made"
    assert "## Fidelity to the base model" in (made / "README.md").read_text()
    assert (made / "dashboard" / "index.html").is_file()


def test_the_source_distribution_holds_the_sources_of_the_wheel(dist):
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "Makefile", "constraints.txt", "mxd_convert/__init__.py"} <= names
    assert {"recipes/quickstart.yaml", "model_cards/template.md", "examples/quickstart-lm/model.safetensors"} <= names
    assert not [name for name in names if ".venv" in name or name.startswith("runs/")]
