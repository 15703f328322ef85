"""`label`: notes on experts that travel with the checkpoint."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mxd_convert.checkpoint.labels import Label, first_problem, parse_labels, read_labels, write_labels
from mxd_convert.checkpoint.read import read_config
from mxd_convert.errors import InputError
from mxd_convert.files import locked


def add_labels(checkpoint: str | Path, labels: Iterable[Label | Mapping[str, Any]] | str | Path) -> list[Label]:
    """Adds labels to a checkpoint; an author's newer label of an expert replaces the older. Returns all that are there then.

    labels: Label objects, mappings, or a JSON file of them. Raises InputError where one does not fit the checkpoint; nothing is then changed.
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
                f"label: layer {label.layer} has no experts here; layers with some: {', '.join(_with_experts(layers))}"
            )
        if label.expert >= count:
            raise InputError(f"label: layer {label.layer} has experts 0 to {count - 1}; there is no expert {label.expert}")
    with locked(folder):  # somebody else may be adding some at this moment
        kept = {(label.layer, label.expert, label.author): label for label in [*read_labels(folder), *new]}
        ordered = [kept[key] for key in sorted(kept)]
        write_labels(folder, ordered)
    return ordered


def _with_experts(layers: Mapping[str, Any]) -> list[str]:
    return [index for index, layer in layers.items() if layer.get("n_experts")] or ["none"]
