"""Base models with custom code (`trust_remote_code`), and the classes of their converted models.

A checkpoint of such a model has the base's Python files, ours, and two generated files that import both. None of them runs unless
the user trusts it.
"""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_relative_import_files

from mxd_convert.errors import InputError
from mxd_convert.modeling import SHIPPED

CONFIGURATION, MODELING = "configuration_mxd_base", "modeling_mxd_base"
PREFIX = "mxd_own_"  # of the model_type, so that it can't clash with a type that transformers knows
_HEAD = '"""Joins MxD layers to the base model\'s own code. Written by mxd-convert."""\n\n'
_trusted: ContextVar[bool] = ContextVar("trusted", default=False)


class NotTrusted(InputError):
    """An error for custom code that would have to run without being trusted."""


@contextmanager
def trusting(trusted: bool = True) -> Iterator[None]:
    """Trust custom code of checkpoints and base models within the block."""
    before = _trusted.set(trusted or _trusted.get())
    try:
        yield
    finally:
        _trusted.reset(before)


def is_trusted() -> bool:
    """Return whether custom code is trusted in the current context."""
    return _trusted.get()


def has_own_code(model: Any) -> bool:
    """Return whether a model's class is defined outside of transformers."""
    return not type(model).__module__.startswith("transformers.")


def joined(base: Any) -> Any:
    """Return the class of the converted model for a base with custom code."""
    stem = type(base.config).__name__.removesuffix("Config")
    config, model, headless = type(base.config), type(base), type(base.base_model)
    with tempfile.TemporaryDirectory(prefix="mxd_") as scratch:
        folder = Path(scratch)
        for source in (*_files(config, model, headless), *SHIPPED):
            shutil.copyfile(source, folder / source.name)
        (folder / f"{CONFIGURATION}.py").write_text(
            f"{_HEAD}{_import(config)}\nfrom .configuration_mxd import make_config\n\n"
            f'Mxd{stem}Config = make_config("{stem}", {config.__name__}, __name__, "{PREFIX}")\n'
        )
        (folder / f"{MODELING}.py").write_text(
            f"{_HEAD}{_import(model)}\n{_import(headless)}\nfrom .{CONFIGURATION} import Mxd{stem}Config\nfrom .modeling_mxd import make_model\n\n"
            f'Mxd{stem}ForCausalLM = make_model(Mxd{stem}Config, {model.__name__}, "AutoModelForCausalLM", __name__)\n'
            f'Mxd{stem}Model = make_model(Mxd{stem}Config, {headless.__name__}, "AutoModel", __name__)\n'
        )
        return get_class_from_dynamic_module(f"{MODELING}.Mxd{stem}ForCausalLM", str(folder))


def _files(*classes: Any) -> list[Path]:
    """Return the files that define the classes, except transformers' own, and the files that they import relatively."""
    found: dict[str, Path] = {}
    for one in classes:
        if not one.__module__.startswith("transformers."):
            file = str(sys.modules[one.__module__].__file__)
            found |= {Path(path).name: Path(path) for path in (file, *get_relative_import_files(file))}
    return list(found.values())


def _import(one: Any) -> str:
    module = one.__module__ if one.__module__.startswith("transformers.") else f".{one.__module__.rpartition('.')[2]}"
    return f"from {module} import {one.__name__}"


def class_in(folder: Path, auto_map: Any, auto_class: str) -> Any | None:
    """Return a class that a checkpoint defines with custom code, or None if it has only our code.

    Raises NotTrusted if custom code is not trusted.
    """
    reference = auto_map.get(auto_class) if isinstance(auto_map, dict) else None
    if not isinstance(reference, str) or not reference.startswith((f"{CONFIGURATION}.", f"{MODELING}.")):
        return None
    if not is_trusted():
        raise NotTrusted(
            f"{folder}: its base model has custom code, which is not run by default. Read its .py files, then put"
            " --trust-remote-code before the command (in Python: with mxd_convert.trusting(): ...)."
        )
    return get_class_from_dynamic_module(reference, str(folder))
