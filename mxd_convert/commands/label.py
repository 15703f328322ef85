"""`label`: add notes on experts to a checkpoint."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mxd_convert.checkpoint.labels import Label, first_problem, parse_labels, read_labels, write_labels
from mxd_convert.checkpoint.read import read_config
from mxd_convert.errors import InputError
from mxd_convert.files import locked


def add_labels(checkpoint: str | Path, labels: Iterable[Label | Mapping[str, Any]] | str | Path) -> list[Label]:
    """Add labels to a checkpoint. An author's new label of an expert replaces their earlier one.

    Args:
        checkpoint: the checkpoint's folder.
        labels: Label objects, mappings with the same fields, or the path of a JSON file with a list of mappings.

    Returns:
        All labels of the checkpoint, sorted by layer, expert and author.

    Raises:
        InputError: if a label is invalid or its expert doesn't exist. No label is added then.
    """
    folder = Path(checkpoint)
    layers = read_config(folder).mxd["layers"]
    if isinstance(labels, str | Path):
        new = parse_labels(Path(labels))
    else:
        try:
            new = [label if isinstance(label, Label) else Label.model_validate(label) for label in labels]
        except ValidationError as error:
            raise InputError(f"label: {first_problem(error)}") from None
    for label in new:
        count = layers.get(str(label.layer), {}).get("n_experts")
        if count is None:
            raise InputError(
                f"label: layer {label.layer} has no experts. Layers with experts: {', '.join(_with_experts(layers))}."
            )
        if label.expert >= count:
            raise InputError(
                f"label: layer {label.layer} has no expert {label.expert}. Choose one of its experts 0 to {count - 1}."
            )
    with locked(folder):  # another process may be adding labels
        kept = {(label.layer, label.expert, label.author): label for label in [*read_labels(folder), *new]}
        ordered = [kept[key] for key in sorted(kept)]
        write_labels(folder, ordered)
    return ordered


def _with_experts(layers: Mapping[str, Any]) -> list[str]:
    """Return the indices of the layers that have experts, or "none"."""
    return [index for index, layer in layers.items() if layer.get("n_experts")] or ["none"]
