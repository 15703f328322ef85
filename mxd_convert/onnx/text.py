"""The comparison text of an ONNX export: the user's text, or text that the checkpoint was not trained on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxd_convert.base_model.load import load_tokenizer
from mxd_convert.checkpoint.read import checkpoint_settings, read_local
from mxd_convert.data.blocks import Blocks, check_vocabulary, prepare_eval
from mxd_convert.errors import InputError
from mxd_convert.files import temporary_sibling
from mxd_convert.recipe.load import read_recipe_yaml, shipped_folder
from mxd_convert.recipe.texts import EvalText

SHIPPED = "python-docs.jsonl.gz"


@dataclass(frozen=True)
class Source:
    """A text. held_out: whether to read only the tenth of its documents that a run holds out of training."""

    path: str
    field: str = "text"
    held_out: bool = False


@contextmanager
def opened(
    checkpoint: Path, output: Path, data: str | Path | None, tokens: int, text_field: str, vocabulary: int
) -> Iterator[tuple[Blocks, bool | None]]:
    """Yield (blocks, held_out): the comparison text, and whether it was held out of training (None if unknown).

    The blocks have the checkpoint's evaluation context. The first available text is used: `data`; the checkpoint's evaluation
    text; the held-out documents of its training text; the documentation shipped with this package. A recorded text must be
    on this machine and long enough.

    Args:
        checkpoint: the converted checkpoint.
        output: the folder to export to. Tokens are kept in a temporary folder next to it.
        data: a local file, folder or glob; None selects a text.
        tokens: most tokens to read.
        text_field: field of a document with its text, for `data`.
        vocabulary: vocabulary size of the model.

    Raises:
        InputError: if `tokens` is less than one block, or the text is unreadable.
    """
    context, _ = checkpoint_settings(checkpoint)
    if tokens < context:
        raise InputError(f"--tokens {tokens}: fewer than one block of {context} tokens. Set --tokens to {context} or more.")
    tokenizer = load_tokenizer(str(checkpoint))
    shipped = Source(str(shipped_folder().parent / "examples" / SHIPPED))
    sources = [Source(str(Path(data).expanduser().absolute()), text_field)] if data else [*_recorded(checkpoint), shipped]
    with temporary_sibling(output) as scratch:
        for source in sources:
            wanted = EvalText(path=source.path, text=source.field, tokens=tokens)
            try:
                blocks = prepare_eval(wanted, context, tokenizer, scratch, source.held_out)
            except InputError:
                if source is sources[-1]:
                    raise
                continue
            check_vocabulary(blocks.ids, vocabulary)
            yield blocks, None if data or source is shipped else True
            return


def _recorded(checkpoint: Path) -> Iterator[Source]:
    """Yield the evaluation and training texts of the checkpoint's run, if it was on this machine."""
    recorded = read_local(checkpoint).get("data")
    paths: dict[str, Any] = recorded if isinstance(recorded, dict) else {}
    for split in ("eval", "train"):
        if isinstance(paths.get(split), str):
            yield Source(paths[split], _field(checkpoint, split), held_out=split == "train")


def _field(checkpoint: Path, split: str) -> str:
    """Return the text field in the checkpoint's recipe for a split, by default "text"."""
    path = checkpoint / "recipe.yaml"
    data = read_recipe_yaml(path).get("data") if path.is_file() else None
    source = data.get(split) if isinstance(data, dict) else None
    field = source.get("text") if isinstance(source, dict) else None
    return field if isinstance(field, str) else "text"
