"""Imports run downwards, files stay small, and the docs' map is the code's."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "mxd_convert"
# floors of the house, from the ground up; a room may import from its own floor and from those below
FLOORS = [
    {"errors"},
    {"escaping"},
    {"files", "recipe", "processes", "modeling", "_probe"},
    {"sealed", "recipe_file", "report_schema", "architectures", "base", "data", "own_code"},
    {"layers", "harvest", "surgery", "checkpoint", "labels"},
    {
        "training",
        "evaluation",
        "plan",
        "verification",
        "provenance",
        "reverting",
        "generation",
        "inspecting",
        "starter",
        "workspace",
        "exporting",
        "onnx",
    },
    {"report"},
    {"pipeline", "editing", "probing", "hub", "deltas"},
    {"sweeping"},
    {"cli", "_registration"},
]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def imports_of(path: Path) -> set[str]:
    """The rooms of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mxd_convert"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found


SMALL = 420  # lines; a file that grows past this wants to be two
SHIPPED = 490  # the same of modeling_mxd.py: a checkpoint holds two files of code, whose names others rely on
STANDARD = {"collections", "contextlib", "contextvars", "re", "threading", "types", "typing"}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path):
    for room in imports_of(path):
        assert floor_of(room) <= floor_of(room_of(path)), f"{path.name} imports {room}, which is above it"


def test_what_ships_in_a_checkpoint_imports_nothing_of_ours():
    for path in (PACKAGE / "modeling").glob("*.py"):
        assert not imports_of(path)
        absolute = {
            node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and not node.level
        }
        assert {name.split(".")[0] for name in absolute} <= {"torch", "transformers", *STANDARD}


def test_layers_know_neither_files_nor_models():
    for path in (PACKAGE / "layers").glob("*.py"):
        assert imports_of(path) <= {"layers", "modeling"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= (SHIPPED if path.name == "modeling_mxd.py" else SMALL)


def test_test_files_stay_small():
    for path in (ROOT / "tests").glob("*.py"):
        assert len(path.read_text().splitlines()) <= SMALL, path.name


def test_every_room_is_on_the_map():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for room in {room_of(path) for path in FILES}:
        assert room in text, f"{room} is not in docs/architecture.md"


def test_nothing_is_pickled():
    for path in FILES:
        assert "pickle" not in path.read_text().replace("No pickle", ""), path
        assert "torch.load" not in path.read_text(), path
        assert "torch.save" not in path.read_text(), path
