"""The comparison text of an ONNX export: the user's text, or text that the checkpoint was not trained on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mxd_convert.base_model.load import load_tokenizer
from mxd_convert.checkpoint.read import checkpoint_settings
from mxd_convert.checkpoint.texts import recorded_data
from mxd_convert.data.blocks import Blocks, check_vocabulary, prepare_eval
from mxd_convert.errors import InputError
from mxd_convert.files import temporary_sibling
from mxd_convert.recipe.load import shipped_folder
from mxd_convert.recipe.texts import EvalText

SHIPPED = "python-docs.jsonl.gz"


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
    recorded, held_out_only = (None, False) if data else _recorded(checkpoint, tokens)
    last = EvalText(path=str(shipped_folder().parent / "examples" / SHIPPED), tokens=tokens)
    if data:
        last = EvalText(path=str(Path(data).expanduser().absolute()), text=text_field, tokens=tokens)
    with temporary_sibling(output) as scratch:
        for text in (recorded, last) if recorded else (last,):
            try:
                blocks = prepare_eval(text, context, tokenizer, scratch, held_out_only and text is recorded)
            except InputError:
                if text is last:
                    raise
                continue
            check_vocabulary(blocks.ids, vocabulary)
            yield blocks, True if text is recorded else None
            return


def _recorded(checkpoint: Path, tokens: int) -> tuple[EvalText | None, bool]:
    """Return (text, whether only a part of its documents was held out of training) of the checkpoint's run, or (None, False)."""
    try:
        data = recorded_data(checkpoint)
    except InputError:
        return None, False
    given = data.eval.is_given
    text = data.eval if given else data.train
    fields = text.model_dump(exclude={"tokens"} if text.sources is None else {"tokens", "path"})
    return EvalText.model_validate({**fields, "tokens": tokens}), not given
