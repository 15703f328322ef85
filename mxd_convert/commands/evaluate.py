"""`eval`: fidelity and reliance of a checkpoint on a text."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from mxd_convert.base_model.families import find_sites
from mxd_convert.base_model.load import load_tokenizer
from mxd_convert.checkpoint.read import checkpoint_settings, load_checkpoint, original_of
from mxd_convert.data.blocks import check_vocabulary, prepare_eval
from mxd_convert.errors import InputError
from mxd_convert.evaluation.fidelity import evaluate_models
from mxd_convert.recipe.schema import EvalText


def evaluate(
    checkpoint: str | Path,
    data: str | Path,
    tokens: int = 262_144,
    text_field: str = "text",
    base: str | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """The report's fidelity and reliance parts for a checkpoint, loaded from disk, on a text.

    data: a local text file, folder or glob. tokens: how many to use at most. base: the base model, where not the recorded one.
    device: None takes a CUDA device if there is one.
    Returns {"data": ..., "fidelity": ..., "reliance": ...}, keys as in docs/report.md. Raises InputError.
    """
    context, mask_bos = checkpoint_settings(Path(checkpoint))
    if tokens < context:
        raise InputError(f"--tokens {tokens}: fewer than one block of {context}; give more")
    converted = load_checkpoint(checkpoint, dtype="float32")
    original = original_of(checkpoint, converted, base)
    original = original.float()
    sites = find_sites(original, converted.config, sorted(converted.mxd_layers()))
    with tempfile.TemporaryDirectory() as folder:
        source = EvalText(path=str(Path(data).expanduser().absolute()), text=text_field, tokens=tokens)
        blocks = prepare_eval(source, context, load_tokenizer(str(checkpoint)), Path(folder))
        check_vocabulary(blocks, original.config.get_text_config().vocab_size)
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        figures = evaluate_models(original, converted, sites, blocks, mask_bos=mask_bos, device=place, quiet=quiet)
        used = len(blocks) * blocks.context
    about = {"path": blocks.info.path, "fingerprint": blocks.info.fingerprint, "tokens": used, "documents": blocks.info.documents}
    return {"data": about, **figures}
