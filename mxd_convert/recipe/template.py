"""A recipe as commented YAML: every key with its value, below its meaning."""

import textwrap
from typing import Any, get_args

import yaml

from mxd_convert.recipe.schema import Recipe
from mxd_convert.recipe.section import Section

_WIDTH = 118  # characters of a comment line


def commented(recipe: Recipe, title: str, base_model: str) -> str:
    """Return the YAML of a recipe with each key's description as a comment above it.

    Args:
        recipe: whose values are written.
        title: the model that it converts, for the first line.
        base_model: written as `base.model`, for example a path relative to the recipe's folder.
    """
    head = f"# Converts {title}.\n# `mxd-convert plan THIS_FILE` shows its size and cost, `mxd-convert run THIS_FILE` runs it.\n"
    return head + "\n" + _section(Recipe, recipe.model_dump(), base_model, 0)


def _section(section: type[Section], values: dict[str, Any], base_model: str, depth: int) -> str:
    """Return the YAML of a section and its subsections."""
    lines = []
    for name, field in section.model_fields.items():
        value, indent = values[name], "  " * depth
        if depth == 0:
            lines.append("")
        lines += textwrap.wrap(field.description or "", _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        if isinstance(value, dict):
            annotation = next(kind for kind in (*get_args(field.annotation), field.annotation) if kind is not type(None))
            assert issubclass(annotation, Section)
            lines.append(f"{indent}{name}:")
            lines.append(_section(annotation, value, base_model, depth + 1))
        else:
            shown = base_model if name == "model" else value
            lines.append(f"{indent}{name}: {yaml.safe_dump(shown, default_flow_style=True).strip().removesuffix('...').strip()}")
    return "\n".join(lines).lstrip("\n") + ("\n" if depth == 0 else "")
