"""The text that an export is compared on: the one given, else what is at hand that the checkpoint was not trained on."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mxd_convert.base import load_tokenizer
from mxd_convert.checkpoint import read_local
from mxd_convert.data import Blocks, check_vocabulary, prepare_eval
from mxd_convert.errors import InputError
from mxd_convert.evaluation.run import checkpoint_settings
from mxd_convert.recipe import EvalText
from mxd_convert.recipe_file import shipped_folder

SHIPPED = "python-docs.jsonl.gz"


@dataclass(frozen=True)
class Source:
    """A text. held_out: whether only the tenth of its documents is read that a run holds out of it."""

    path: Path
    field: str = "text"
    held_out: bool = False


def source_of(checkpoint: Path, data: str | Path | None, text_field: str) -> Source:
    """The given text, else the checkpoint's evaluation text, else what it held out of its training text, where these are on this
    machine, else the documentation that ships with this package."""
    if data is not None:
        return Source(Path(data).expanduser().absolute(), text_field)
    recorded = read_local(checkpoint).get("data")
    paths: dict[str, Any] = recorded if isinstance(recorded, dict) else {}
    for part in ("eval", "train"):
        path = paths.get(part)
        if isinstance(path, str) and Path(path).exists():
            return Source(Path(path), _field(checkpoint, part), held_out=part == "train")
    return Source(shipped_folder().parent / "examples" / SHIPPED)


@contextmanager
def opened(checkpoint: Path, source: Source, tokens: int, vocabulary: int) -> Iterator[Blocks]:
    """Its blocks, as the checkpoint is evaluated in. Raises InputError."""
    context, _ = checkpoint_settings(checkpoint)
    if tokens < context:
        raise InputError(f"--tokens {tokens}: fewer than one block of {context}; give more")
    wanted = EvalText(path=str(source.path), text=source.field, tokens=tokens)
    with tempfile.TemporaryDirectory() as scratch:
        blocks = prepare_eval(wanted, context, load_tokenizer(str(checkpoint)), Path(scratch), source.held_out)
        check_vocabulary(blocks, vocabulary)
        yield blocks


def _field(checkpoint: Path, part: str) -> str:
    try:
        recipe = yaml.safe_load((checkpoint / "recipe.yaml").read_text(encoding="utf-8"))
        return str(recipe["data"][part]["text"])
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return "text"
