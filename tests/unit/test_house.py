"""The layout of the package: imports point downwards without cycles, files stay short, the architecture page names every package."""

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest
from project import ROOT

PACKAGE = ROOT / "mxd_convert"
PAGE = ROOT / "docs" / "architecture.md"
# From the lowest level up. A file imports from its own level and from those below. `report.schema` is on a lower level than its package:
# like the recipe, the form of mxd_report.json is a contract.
LEVELS = [
    {"errors", "escaping", "files"},
    {"modeling", "recipe", "report.schema"},
    {"layers", "base_model", "data"},
    {"plan", "training", "evaluation", "checkpoint"},
    {"report", "dashboard", "export", "hub", "onnx"},
    {"commands"},
    {"cli"},
]
MAX_LEVELS, MAX_ENTRIES = 8, 24  # levels; files and folders of the package
MAX_LINES = 450  # of a file of the package
MAX_TEST_LINES = 400
STANDARD = {"collections", "contextlib", "contextvars", "numbers", "pathlib", "re", "threading", "types", "typing"}


def module_of(path: Path, package: Path = PACKAGE) -> str:
    """`training.stage` for training/stage.py; a package is named without its `__init__`; the package itself is ""."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str, module: str, modules: set[str]) -> Iterator[str]:
    """Yield the package's modules that a file imports, in any form and anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = node.module or ""
            if node.level:  # `from .configuration_mxd import x`
                above = module.split(".")[: -node.level] if module else []
                parent = ".".join(["mxd_convert", *above, *([node.module] if node.module else [])])
            names = [f"{parent}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name == "mxd_convert" or name.startswith("mxd_convert."):
                inner = name.removeprefix("mxd_convert").lstrip(".")
                yield inner if inner in modules else inner.rpartition(".")[0]


@cache
def graph() -> Mapping[str, frozenset[str]]:
    """Return the imports of every module, except those of the public API, which imports lazily by name."""
    paths = {module_of(path): path for path in PACKAGE.rglob("*.py")}
    return {
        module: frozenset(imported(path.read_text(), module, set(paths))) - {"", module}
        for module, path in paths.items()
        if module
    }


def level_of(module: str) -> int:
    names = (module, module.split(".", maxsplit=1)[0])
    return next(number for name in names for number, level in enumerate(LEVELS) if name in level)


def cycle(edges: Mapping[str, frozenset[str]]) -> list[str]:
    """Return the modules of a cycle of imports, or an empty list."""
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in edges.get(module, ()):
            if found := walk(other, (*path, module)):
                return found
        done.add(module)
        return []

    return next((found for module in edges if (found := walk(module, ()))), [])


@pytest.mark.parametrize("module", sorted(graph()))
def test_imports_point_downwards(module):
    for other in graph()[module]:
        assert level_of(other) <= level_of(module), f"{module} imports {other}, which is above it"


def test_imports_form_no_cycle():
    assert cycle(graph()) == []


def test_every_form_of_import_is_seen():
    modules = {"a", "b", "b.c", "b.d"}
    forms = {
        "import mxd_convert.b.c": "b.c",
        "def f():\n    import mxd_convert.a as x": "a",
        "from mxd_convert.b.c import name": "b.c",
        "from mxd_convert.b import c": "b.c",
        "from mxd_convert import a": "a",
        "from .d import name": "b.d",
        "from . import d": "b.d",
    }
    for source, module in forms.items():
        assert set(imported(source, "b.c", modules)) == {module}, source
    assert cycle({"a": frozenset({"b.c"}), "b.c": frozenset({"a"}), "b": frozenset()}) == ["a", "b.c", "a"]


def test_the_package_has_few_levels_and_few_entries():
    entries = {path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or any(path.glob("**/*.py"))}
    assert len(LEVELS) <= MAX_LEVELS
    assert len(entries) <= MAX_ENTRIES, entries
    packages = {name.removesuffix(".py") for name in entries} - {"__init__"}
    assert packages == {package for level in LEVELS for package in level if "." not in package}


def test_a_command_has_the_same_name_in_cli_and_commands():
    commands = {path.stem for path in (PACKAGE / "commands").glob("*.py")} - {"__init__"}
    shown = {path.stem for path in (PACKAGE / "cli").glob("*.py")} - {"__init__", "__main__", "app", "figures", "signals"}
    assert commands == shown


def test_the_command_line_calls_only_the_public_api():
    allowed = {"cli", "errors", "escaping", "files", "checkpoint.registration", "training.distributed"}
    for module, others in graph().items():
        if module.split(".")[0] == "cli":
            assert {other for other in others if other.split(".")[0] != "cli"} <= allowed, module


def test_code_shipped_in_a_checkpoint_imports_nothing_of_the_package():
    for path in (PACKAGE / "modeling").glob("*.py"):
        assert {other.split(".")[0] for other in graph()[module_of(path)]} <= {"modeling"}
        absolute = {
            node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and not node.level
        }
        assert {name.split(".")[0] for name in absolute} <= {"torch", "transformers", *STANDARD}


def test_layers_import_neither_files_nor_models():
    for module, others in graph().items():
        if module.split(".")[0] == "layers":
            assert {other.split(".")[0] for other in others - {"recipe.kinds"}} <= {"layers", "modeling"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_of)
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_test_files_stay_short():
    for path in (ROOT / "tests").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= MAX_TEST_LINES, path.name


def test_test_modules_import_neither_each_other_nor_conftest():
    paths = [path for folder in ("unit", "promises", "families") for path in (ROOT / "tests" / folder).glob("*.py")]
    forbidden = {"conftest", *(path.stem for path in paths)}
    assert len(forbidden) > 40
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {part for name in names for part in name.split(".")} & forbidden, f"{path.name} imports {names}"


def rows_of(page: str) -> dict[str, str]:
    """Return the text of every row in the page's table of packages, by package."""
    rows = [line.strip("| ").split(" | ", 1) for line in page.splitlines() if line.startswith("| `")]
    return {name.strip("`/").removesuffix(".py"): text for name, text in rows}


def test_every_package_has_a_row_in_the_architecture_page():
    rows = rows_of(PAGE.read_text())
    for level in LEVELS:
        for package in level:
            if "." not in package:
                assert rows.get(package), f"docs/architecture.md has no row of {package}"
    for module in graph():
        package, _, file = module.partition(".")
        if file and file != "__main__" and package not in ("cli", "commands"):  # whose files have the commands' names
            name = file.split(".")[0]
            assert f"`{name}" in rows[package], f"docs/architecture.md does not say what {package}/{name} is"


def test_the_table_of_the_page_is_parsed():
    assert rows_of("# Packages\n\n| package | content |\n|---|---|\n| `data/` | `blocks.py`: tokens |\n") == {
        "data": "`blocks.py`: tokens"
    }
    assert rows_of("the packages are data, plan and training") == {}


def work_in(constructor: ast.FunctionDef) -> set[str]:
    """Return the calls in a constructor that read or write files, run a model or restore a state."""
    calls = {ast.unparse(node.func) for node in ast.walk(constructor) if isinstance(node, ast.Call)}
    working = r"(\.|^)(open|mkdir|unlink|read_\w+|write_\w+|load_\w+|save_\w+|restore|generate|forward|model|base)$"
    return {call for call in calls if re.search(working, call)}


@pytest.mark.parametrize("module", sorted(graph()))
def test_constructors_do_no_work(module):
    """Files are opened and models run by methods and by class methods such as `create`, never by `__init__`."""
    path = PACKAGE.joinpath(*module.split("."))
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in ("__init__", "__post_init__"):
            assert work_in(node) == set(), f"{module}, line {node.lineno}"


def test_work_in_a_constructor_is_seen():
    for body in ("self.model(ids)", "folder.mkdir()", "self._file = path.open('wb')", "self.state = load_state(folder)"):
        [constructor] = ast.parse(f"def __init__(self):\n    {body}\n").body
        assert work_in(constructor), body


def test_nothing_is_pickled():
    for path in PACKAGE.rglob("*.py"):
        assert "pickle" not in path.read_text().replace("No pickle", ""), path
        assert "torch.load" not in path.read_text(), path
        assert "torch.save" not in path.read_text(), path
