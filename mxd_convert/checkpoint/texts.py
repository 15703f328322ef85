"""The texts that a checkpoint was trained and evaluated on."""

from pathlib import Path

from mxd_convert.checkpoint.read import read_local
from mxd_convert.errors import InputError, first_line
from mxd_convert.recipe.load import read_recipe_yaml
from mxd_convert.recipe.texts import Data


def recorded_data(folder: Path) -> Data:
    """Return the section `data` of a checkpoint's recipe, with the paths in `mxd_local.json`.

    Raises InputError if a path is not recorded there, or the recipe is missing or invalid.
    """
    paths = read_local(folder).get("data")
    try:
        settings = read_recipe_yaml(folder / "recipe.yaml")["data"]
        for split in ("train", "eval"):
            text = settings[split]
            sources = text.get("sources") or [text]
            if sources == [text] and text["path"] is None:
                continue
            recorded = paths.get(split) if isinstance(paths, dict) else None
            # a single path in checkpoints before version 0.2
            for source, path in zip(sources, recorded if isinstance(recorded, list) else [recorded], strict=True):
                source["path"] = path
                if not isinstance(path, str):
                    raise InputError(
                        "the paths of the texts are not recorded on this machine. Run the recipe with the texts to recompute the"
                        " fingerprints."
                    )
        return Data(**settings)
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{folder / 'recipe.yaml'}: its texts can't be read ({first_line(error)}).") from None
