"""The text that an export is compared on: the one given, else what is at hand that the checkpoint was not trained on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxd_convert.base_model.load import load_tokenizer
from mxd_convert.checkpoint.read import checkpoint_settings, read_local
from mxd_convert.data.blocks import Blocks, check_vocabulary, prepare_eval
from mxd_convert.errors import InputError
from mxd_convert.files import scratch_beside
from mxd_convert.recipe.load import read_recipe_yaml, shipped_folder
from mxd_convert.recipe.schema import EvalText

SHIPPED = "python-docs.jsonl.gz"


@dataclass(frozen=True)
class Source:
    """A text. held_out: whether only the tenth of its documents is read that a run holds out of it."""

    path: str
    field: str = "text"
    held_out: bool = False


@contextmanager
def opened(
    checkpoint: Path, output: Path, data: str | Path | None, tokens: int, text_field: str, vocabulary: int
) -> Iterator[tuple[Blocks, bool | None]]:
    """(blocks of a text, as the checkpoint is evaluated in; whether it had no part in the training, None where that is not known).

    The given text; else the checkpoint's evaluation text, or what it held out of its training text, where these are on this machine and
    long enough; else the documentation that ships with this package. output: the folder to write; the tokens are kept beside it until
    then. Raises InputError.
    """
    context, _ = checkpoint_settings(checkpoint)
    if tokens < context:
        raise InputError(f"--tokens {tokens}: fewer than one block of {context}; give more")
    tokenizer = load_tokenizer(str(checkpoint))
    shipped = Source(str(shipped_folder().parent / "examples" / SHIPPED))
    sources = [Source(str(Path(data).expanduser().absolute()), text_field)] if data else [*_recorded(checkpoint), shipped]
    with scratch_beside(output) as scratch:
        for source in sources:
            wanted = EvalText(path=source.path, text=source.field, tokens=tokens)
            try:
                blocks = prepare_eval(wanted, context, tokenizer, scratch, source.held_out)
            except InputError:
                if source is sources[-1]:
                    raise
                continue
            check_vocabulary(blocks, vocabulary)
            yield blocks, None if data or source is shipped else True
            return


def _recorded(checkpoint: Path) -> Iterator[Source]:
    """The texts of the checkpoint's run, if it was on this machine."""
    recorded = read_local(checkpoint).get("data")
    paths: dict[str, Any] = recorded if isinstance(recorded, dict) else {}
    for part in ("eval", "train"):
        if isinstance(paths.get(part), str):
            yield Source(paths[part], _field(checkpoint, part), held_out=part == "train")


def _field(checkpoint: Path, part: str) -> str:
    """The field of a document that the checkpoint's recipe names; the usual one where it names none."""
    path = checkpoint / "recipe.yaml"
    data = read_recipe_yaml(path).get("data") if path.is_file() else None
    source = data.get(part) if isinstance(data, dict) else None
    field = source.get("text") if isinstance(source, dict) else None
    return field if isinstance(field, str) else "text"
