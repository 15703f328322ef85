"""`eval`: fidelity and reliance of a checkpoint on a text."""

import tempfile
from pathlib import Path
from typing import Any

from mxd_convert.base_model.families import find_sites
from mxd_convert.base_model.load import load_tokenizer, pick_device
from mxd_convert.checkpoint.read import checkpoint_settings, load_checkpoint, original_of
from mxd_convert.data.blocks import check_vocabulary, prepare_eval
from mxd_convert.errors import InputError
from mxd_convert.evaluation.fidelity import evaluate_models
from mxd_convert.recipe.schema import figure_mask
from mxd_convert.recipe.texts import EvalText


def evaluate(
    checkpoint: str | Path,
    data: str | Path,
    tokens: int = 262_144,
    text_field: str = "text",
    base: str | None = None,
    device: str | None = None,
    quiet: bool = False,
    quick: bool = False,
) -> dict[str, Any]:
    """Evaluate a checkpoint on a text, in float32.

    Args:
        checkpoint: Folder of the converted checkpoint.
        data: Held-out text: a local file, folder or glob.
        tokens: Maximum number of tokens to evaluate on.
        text_field: Field with the text of each document.
        base: Base model to use instead of the recorded one.
        device: Torch device. None uses CUDA if available, else the CPU.
        quiet: Print no progress.
        quick: Measure only the whole model's fidelity, and FVU, L0 and shares of the layers, in two passes over the text.

    Returns:
        A dict with the report's sections `data`, `fidelity` and `reliance`, and `cost` (docs/report.md).

    Raises:
        InputError: The checkpoint, its base model or the text can't be used.
    """
    context, mask = checkpoint_settings(Path(checkpoint))
    if tokens < context:
        raise InputError(f"--tokens {tokens}: fewer than one block of {context} tokens. Set --tokens to {context} or more.")
    converted = load_checkpoint(checkpoint, dtype="float32")
    original = original_of(checkpoint, converted, base)
    original = original.float()
    sites = find_sites(original, converted.config, sorted(converted.mxd_layers()))
    with tempfile.TemporaryDirectory() as folder:
        source = EvalText(path=str(Path(data).expanduser().absolute()), text=text_field, tokens=tokens)
        blocks = prepare_eval(source, context, load_tokenizer(str(checkpoint)), Path(folder))
        check_vocabulary(blocks.ids, original.config.get_text_config().vocab_size)
        torch_device = pick_device(device)
        figures = evaluate_models(original, converted, sites, blocks, figure_mask(mask), torch_device, quiet, quick=quick)
        used = len(blocks) * blocks.context
    about = {"path": blocks.info.path, "fingerprint": blocks.info.fingerprint, "tokens": used, "documents": blocks.info.documents}
    return {"data": about, **figures}
