"""Recipes: the settings of a run, read from YAML and `--set`, and completed by presets."""

from mxd_convert.recipe.schema import Base, Layer, Mlp, Output, Recipe, Train
from mxd_convert.recipe.texts import Data, EvalText, Text

__all__ = ["Base", "Data", "EvalText", "Layer", "Mlp", "Output", "Recipe", "Text", "Train"]
