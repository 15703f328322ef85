"""Recipes: the settings of a run, read from YAML and `--set`, and completed by presets."""

from mxd_convert.recipe.schema import Base, Data, EvalText, Layer, Mlp, Output, Recipe, Text, Train

__all__ = ["Base", "Data", "EvalText", "Layer", "Mlp", "Output", "Recipe", "Text", "Train"]
