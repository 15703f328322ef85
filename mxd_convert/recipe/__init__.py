"""Recipes: the settings of a run, read from YAML and `--set`, and completed by presets."""
