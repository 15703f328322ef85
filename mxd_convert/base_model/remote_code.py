"""Base models with code of their own (`trust_remote_code`): the classes that join our layers to it, from files that travel with a checkpoint.

Such a checkpoint has, beside the base's files and ours, two more that import both. Nothing of it runs unless it is trusted.
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
PREFIX = "mxd_own_"  # of the model_type, which may be one that transformers knows otherwise
_HEAD = '"""Joins MxD layers to the base model\'s own code. Written by mxd-convert."""\n\n'
_trusted: ContextVar[bool] = ContextVar("trusted", default=False)


class NotTrusted(InputError):
    """Code would have to run that nobody has said may."""


@contextmanager
def trusting(trusted: bool = True) -> Iterator[None]:
    """Within it, code that comes with checkpoints and base models is run."""
    before = _trusted.set(trusted or _trusted.get())
    try:
        yield
    finally:
        _trusted.reset(before)


def is_trusted() -> bool:
    return _trusted.get()


def has_own_code(model: Any) -> bool:
    """Whether a model's class is none of transformers'."""
    return not type(model).__module__.startswith("transformers.")


def joined(base: Any) -> Any:
    """The class of a converted model for a base with code of its own."""
    stem = type(base.config).__name__.removesuffix("Config")
    config, model, headless = type(base.config), type(base), type(base.base_model)
    with tempfile.TemporaryDirectory(prefix="mxd_") as scratch:
        place = Path(scratch)
        for source in (*_files(config, model, headless), *SHIPPED):
            shutil.copyfile(source, place / source.name)
        (place / f"{CONFIGURATION}.py").write_text(
            f"{_HEAD}{_import(config)}\nfrom .configuration_mxd import make_config\n\n"
            f'Mxd{stem}Config = make_config("{stem}", {config.__name__}, __name__, "{PREFIX}")\n'
        )
        (place / f"{MODELING}.py").write_text(
            f"{_HEAD}{_import(model)}\n{_import(headless)}\nfrom .{CONFIGURATION} import Mxd{stem}Config\nfrom .modeling_mxd import make_model\n\n"
            f'Mxd{stem}ForCausalLM = make_model(Mxd{stem}Config, {model.__name__}, "AutoModelForCausalLM", __name__)\n'
            f'Mxd{stem}Model = make_model(Mxd{stem}Config, {headless.__name__}, "AutoModel", __name__)\n'
        )
        return get_class_from_dynamic_module(f"{MODELING}.Mxd{stem}ForCausalLM", str(place))


def _files(*classes: Any) -> list[Path]:
    """Those that the classes are defined in, but for transformers' own, and what these import beside them."""
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
    """A class that a checkpoint defines by code that is not ours; None where it is. Raises NotTrusted."""
    reference = auto_map.get(auto_class) if isinstance(auto_map, dict) else None
    if not isinstance(reference, str) or not reference.startswith((f"{CONFIGURATION}.", f"{MODELING}.")):
        return None
    if not is_trusted():
        raise NotTrusted(
            f"{folder}: made of a base model with code of its own, which is not run unless you say so: read its .py files, and put"
            " --trust-remote-code before the command (in Python: with mxd_convert.trusting(): ...)"
        )
    return get_class_from_dynamic_module(reference, str(folder))
