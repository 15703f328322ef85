"""Assembly of a checkpoint from the base model and trained layers."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mxd_convert.base_model.checks import quiet
from mxd_convert.base_model.load import model_sha256
from mxd_convert.base_model.remote_code import has_own_code
from mxd_convert.base_model.swap import insert_layers
from mxd_convert.layers import Trainable
from mxd_convert.recipe.schema import Base


def origin_of(base: Base, original: Any) -> dict[str, Any]:
    """Return the base model's entry in config.json and in the report. original: the loaded base model."""
    return {
        "model": base.name,
        "revision": base.revision,
        "sha256": model_sha256(original),
        "local": base.is_local,
        **({"gguf_file": base.gguf_file} if base.gguf_file is not None else {}),
        **({"mlp": base.mlp.model_dump(exclude_defaults=True)} if base.mlp is not None else {}),
        **({"own_code": True} if has_own_code(original) else {}),
    }


def assemble(original: Any, layers: Mapping[int, Trainable], origin: dict[str, Any], folder: Path, tokenizer: Any = None) -> Path:
    """Write the base model with trained layers into `folder`, which is replaced.

    Args:
        original: the base model, with the dtype of the checkpoint.
        layers: the trained layers by index.
        origin: the base model's entry in config.json.
        folder: of the checkpoint.
        tokenizer: saved beside the model, if given.

    Returns:
        The folder.
    """
    if folder.exists():
        shutil.rmtree(folder)
    with quiet():
        insert_layers(original, layers, origin).save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return folder
