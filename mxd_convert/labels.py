"""Labels of experts: `mxd_labels.json` in a checkpoint's folder, a list of {"layer", "expert", "text", "author"}; it travels with it."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mxd_convert.checkpoint import read_config
from mxd_convert.errors import InputError
from mxd_convert.files import locked, read_json, write_text

LABELS = "mxd_labels.json"


class Label(BaseModel):
    """What somebody takes an expert to be about."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int = Field(ge=0)
    expert: int = Field(ge=0)
    text: str = Field(min_length=1, max_length=1000)
    author: str = Field(min_length=1, max_length=200)


def read_labels(checkpoint: str | Path) -> list[Label]:
    """The labels that travel with a checkpoint, none where there is no file. Raises InputError for one that can't be read."""
    path = Path(checkpoint) / LABELS
    if not path.is_file():
        return []
    return _parse(path)


def add_labels(checkpoint: str | Path, labels: Iterable[Label | Mapping[str, Any]] | str | Path) -> list[Label]:
    """Adds labels to a checkpoint; an author's newer label of an expert replaces the older. Returns all that are there then.

    labels: Label objects, mappings, or a JSON file of them. Raises InputError where one does not fit the checkpoint; nothing is then changed.
    """
    folder = Path(checkpoint)
    layers = read_config(folder).mxd["layers"]
    if isinstance(labels, str | Path):
        new = _parse(Path(labels))
    else:
        try:
            new = [label if isinstance(label, Label) else Label.model_validate(label) for label in labels]
        except ValidationError as error:
            raise InputError(f"label: {_first(error)}") from None
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


def write_labels(folder: Path, labels: list[Label]) -> None:
    """Writes the file whole or not at all; with no labels there is none."""
    path = folder / LABELS
    if not labels:
        path.unlink(missing_ok=True)
        return
    write_text(path, json.dumps([label.model_dump() for label in labels], indent=2, ensure_ascii=False) + "\n")


def text_of(labels: list[Label]) -> dict[tuple[int, int], str]:
    """By (layer, expert) what is said of it, by all who said something."""
    found: dict[tuple[int, int], str] = {}
    for label in labels:
        key = label.layer, label.expert
        found[key] = f"{found[key]}; {label.text}" if key in found else label.text
    return found


def _with_experts(layers: Mapping[str, Any]) -> list[str]:
    return [index for index, layer in layers.items() if layer.get("n_experts")] or ["none"]


def _parse(path: Path) -> list[Label]:
    try:
        return TypeAdapter(list[Label]).validate_python(read_json(path, "expected a JSON list of layer, expert, text and author"))
    except ValidationError as error:
        raise InputError(f"{path}: {_first(error)}; expected a JSON list of layer, expert, text and author") from None


def _first(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    where = ".".join(map(str, problem["loc"]))
    return f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}" if where else problem["msg"]
