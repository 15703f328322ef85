"""Labels of experts: `mxd_labels.json` in a checkpoint's folder, a list of {"layer", "expert", "text", "author"}."""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mxd_convert.errors import InputError
from mxd_convert.files import read_json, write_text

LABELS = "mxd_labels.json"


class Label(BaseModel):
    """A description of one expert by one author."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int = Field(ge=0)
    expert: int = Field(ge=0)
    text: str = Field(min_length=1, max_length=1000)
    author: str = Field(min_length=1, max_length=200)


def read_labels(checkpoint: str | Path) -> list[Label]:
    """Return the labels of a checkpoint, empty if it has no labels file. Raises InputError if the file is invalid."""
    path = Path(checkpoint) / LABELS
    if not path.is_file():
        return []
    return parse_labels(path)


def write_labels(folder: Path, labels: list[Label]) -> None:
    """Write the labels file of a checkpoint atomically, or remove it if there are no labels."""
    path = folder / LABELS
    if not labels:
        path.unlink(missing_ok=True)
        return
    write_text(path, json.dumps([label.model_dump() for label in labels], indent=2, ensure_ascii=False) + "\n")


def text_of(labels: list[Label]) -> dict[tuple[int, int], str]:
    """Return the text by (layer, expert), joined with "; " if an expert has several labels."""
    found: dict[tuple[int, int], str] = {}
    for label in labels:
        key = label.layer, label.expert
        found[key] = f"{found[key]}; {label.text}" if key in found else label.text
    return found


def parse_labels(path: Path) -> list[Label]:
    """Return the labels in a file. Raises InputError if it is missing or invalid."""
    try:
        return TypeAdapter(list[Label]).validate_python(
            read_json(path, "Expected a JSON list of layer, expert, text and author.")
        )
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error)}. Expected a JSON list of layer, expert, text and author.") from None


def first_problem(error: ValidationError) -> str:
    """Return the location and message of the first problem of a validation error."""
    problem = error.errors(include_url=False)[0]
    where = ".".join(map(str, problem["loc"]))
    return f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}" if where else problem["msg"]
