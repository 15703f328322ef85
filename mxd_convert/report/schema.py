"""`Report`: the schema of mxd_report.json. Every report is validated when it is read, because it may come from anyone.

Figures have the same names in JSON, cards, tables and code. docs/report.md explains each of them.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mxd_convert.errors import InputError
from mxd_convert.files import kind_of, read_mapping


def _number(value: Any) -> Any:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise ValueError("expected a number or null")


Figure = Annotated[int | float | None, BeforeValidator(_number)]
Count = Annotated[int | None, Field(ge=0, le=10**15)]
Name = Annotated[str, Field(max_length=10_000)]


class Section(BaseModel):
    """A section of a report. Unknown keys are kept, so reports of other versions can be read."""

    model_config = ConfigDict(extra="allow", strict=True)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that were set, in the form written to JSON."""
        return self.model_dump(exclude_unset=True)


class Base(Section):
    """The base model. sha256: hash over its tensors."""

    model: Name
    revision: Name | None = None
    sha256: Name | None = None
    own_code: bool = False
    mlp: dict[str, Any] | None = None
    license: Any = None
    license_name: Any = None
    license_link: Any = None
    language: Any = None


class Text(Section):
    """A text: its name, the fingerprint of its documents, and how much of it was used."""

    path: Name
    fingerprint: Name
    tokens: Count = None
    documents: Count = None
    available_tokens: Count = None
    repeats: Figure = None
    disjoint: bool | None = None


class Data(Section):
    """Training and held-out text. masked: the tokens that are left out, and of which figures."""

    train: Text | None = None
    eval: Text | None = None
    masked: Name | None = None


class LayerFidelity(Section):
    """Fidelity of one layer. All layers are converted for the figures in place, only this one for the others."""

    delta_ce: Figure = None
    fvu: Figure = None
    fvu_with_bos: Figure = None
    fvu_in_place_local: Figure = None
    fvu_in_place_teacher: Figure = None
    l0: Figure = None
    dead_fraction: Figure = None
    always_on: Figure = None
    recovered_zero: Figure = None
    recovered_mean: Figure = None


class Fidelity(Section):
    """Fidelity of the converted model to its base: cross-entropies in nats per token, and figures per layer."""

    tokens: Annotated[int, Field(ge=0)]
    ce_base: Figure
    ce_converted: Figure
    delta_ce: Figure
    kl: Figure
    top1_agreement: Figure
    ce_zero_ablation: Figure = None
    ce_mean_ablation: Figure = None
    recovered_zero: Figure = None
    recovered_mean: Figure = None
    compounding: Figure = None
    layers: Annotated[dict[Annotated[str, Field(pattern=r"^\d{1,6}$")], LayerFidelity], Field(min_length=1)]


class LayerReliance(Section):
    """Reliance of one layer on its experts."""

    gate_share: Figure = None
    identity_share: Figure = None
    routing_necessity: Figure = None
    gain_dimensions: Figure = None
    output_dimensions: Figure = None


class Reliance(Section):
    """Reliance of the model on its experts."""

    layers: dict[str, LayerReliance]
    verdict: Name
    sentence: Name | None = None
    dense_twin: dict[str, Figure] | None = None


class OtherText(Section):
    """Figures on another text, added by `eval --record`."""

    class Figures(Section):
        """Figures of the whole model."""

        tokens: Annotated[int, Field(ge=0)]
        delta_ce: Figure
        ce_base: Figure = None
        ce_converted: Figure = None
        kl: Figure = None
        top1_agreement: Figure = None

    data: Text
    fidelity: Figures


class Cost(Section):
    """Time and memory of the run, and the steps at which it was resumed."""

    resumed_at_steps: list[int] = []
    train_seconds: Figure = None
    tokens_per_second: Figure = None
    peak_rss_bytes: Figure = None
    peak_gpu_bytes: Figure = None


class Report(Section):
    """A report. Sections that were not measured are None."""

    base: Base
    recipe_sha256: Name | None = None
    data: Data | None = None
    fidelity: Fidelity | None = None
    reliance: Reliance | None = None
    elsewhere: list[OtherText] = []
    edits: list[dict[str, Any]] = []
    steering: list[dict[str, Any]] = []
    cost: Cost | None = None
    versions: dict[str, Name] | None = None
    seeds: dict[str, int | None] | None = None
    local: list[Name] = []
    files: dict[str, Name] | None = None


def read_report_file(path: Path) -> Report:
    """Read a report. Raises InputError that names the file, the key, its value and the fix."""
    return parse_report(read_mapping(path, "Download it, or convert or evaluate again."), path)


def parse_report(content: Any, path: Path) -> Report:
    """Validate a JSON object as a report. Raises InputError that names `path`."""
    try:
        return Report.model_validate(content)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(map(str, problem["loc"])) or "the report"
        held = "is missing" if problem["type"] == "missing" else f"is {kind_of(problem['input'])} ({problem['input']!r:.60})"
        reason = "" if problem["type"] == "missing" else f": {problem['msg'][0].lower()}{problem['msg'][1:]}"
        raise InputError(f"{path}: {key} {held}{reason}. Download it, or convert or evaluate again.") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply to be a report. Download it, or convert or evaluate again.") from None
