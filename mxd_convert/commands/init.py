"""`init`: write a commented recipe for a base model."""

import os
from pathlib import Path
from typing import Any

from mxd_convert.base_model.families import architecture_of
from mxd_convert.base_model.load import likely_mlp, load_config
from mxd_convert.errors import InputError
from mxd_convert.files import write_text
from mxd_convert.recipe.load import load_recipe
from mxd_convert.recipe.schema import GGUF, Mlp
from mxd_convert.recipe.template import commented


def starter_recipe(base_model: str, folder: Path | None = None) -> str:
    """Return a recipe for `base_model` with every key, its default and its meaning.

    For a family that has no entry in `base_model/families.py`, `base.mlp` is a guess of the MLPs' paths.

    Args:
        base_model: Hub id, folder or GGUF file of the model.
        folder: folder of the recipe; the path of a local model is written relative to it. Default: the current directory.

    Returns:
        The recipe as YAML.

    Raises:
        InputError: if the model can't be converted.
    """
    recipe = load_recipe({"base": {"model": base_model}})
    config = load_config(recipe.base)
    recipe = recipe.model_copy(update={"base": recipe.base.model_copy(update={"mlp": _mlp_of(config)})})
    text = config.get_text_config()
    title = f"{base_model} ({config.model_type}, {text.num_hidden_layers} layers, width {text.hidden_size})"
    shown = os.path.relpath(recipe.base.path, folder or Path.cwd()) if recipe.base.is_local else base_model
    return commented(recipe, title, shown)


def _mlp_of(config: Any) -> Mlp | None:
    """Return the likely MLPs of a family that has no entry in the table of families, otherwise None."""
    try:
        architecture_of(config)
    except InputError:
        if (found := likely_mlp(config)) is None:
            raise
        return found
    return None


def write_starter(base_model: str, path: Path | None = None, force: bool = False) -> Path:
    """Write the starter recipe of `base_model`.

    Args:
        base_model: Hub id, folder or GGUF file of the model.
        path: file to write. Default: NAME-mxd.yaml in the current directory, with the name of the model.
        force: replace an existing file.

    Returns:
        The file.

    Raises:
        InputError: if the model can't be converted, or the file exists and `force` is not set.
    """
    path = path or Path(f"{Path(base_model).name.removesuffix(GGUF)}-mxd.yaml")
    if path.is_dir() or (path.exists() and not force):
        raise InputError(
            f"--output {path}: exists already. Choose another file"
            + ("." if path.is_dir() else ", or use --force to replace it.")
        )
    text = starter_recipe(base_model, path.resolve().parent)
    write_text(path, text)
    return path
