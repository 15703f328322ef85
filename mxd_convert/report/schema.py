"""The form of mxd_report.json, checked wherever one is read: it may come from anyone, and may be damaged."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mxd_convert.errors import InputError
from mxd_convert.files import kind_of, read_mapping


def _number(value: Any) -> Any:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise ValueError("expected a number or null")


Figure = Annotated[float | None, BeforeValidator(_number)]
Count = Annotated[int | None, Field(ge=0, le=10**15)]
Name = Annotated[str, Field(max_length=10_000)]


class _Part(BaseModel):
    """Further keys are kept: reports of every version are read."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Base(_Part):
    model: Name
    revision: Name | None = None
    sha256: Name | None = None


class _Text(_Part):
    path: Name
    fingerprint: Name
    tokens: Count = None
    documents: Count = None


class _Data(_Part):
    train: _Text | None = None
    eval: _Text | None = None
    masked: Name | None = None


class _LayerFidelity(_Part):
    delta_ce: Figure = None
    fvu: Figure = None
    fvu_in_place_local: Figure = None
    l0: Figure = None
    dead_fraction: Figure = None
    always_on: Figure = None
    recovered_zero: Figure = None


class _Fidelity(_Part):
    tokens: Annotated[int, Field(ge=0)]
    ce_base: Figure
    ce_converted: Figure
    delta_ce: Figure
    kl: Figure
    top1_agreement: Figure
    ce_zero_ablation: Figure = None
    ce_mean_ablation: Figure = None
    recovered_zero: Figure = None
    compounding: Figure = None
    layers: Annotated[dict[Annotated[str, Field(pattern=r"^\d{1,6}$")], _LayerFidelity], Field(min_length=1)]


class _LayerReliance(_Part):
    gate_share: Figure = None
    identity_share: Figure = None
    routing_necessity: Figure = None


class _Reliance(_Part):
    layers: dict[str, _LayerReliance]
    verdict: Name
    sentence: Name | None = None


class _Elsewhere(_Part):
    class Figures(_Part):
        tokens: Annotated[int, Field(ge=0)]
        delta_ce: Figure

    data: _Text
    fidelity: Figures


class _Cost(_Part):
    resumed_at_steps: list[int] = []
    train_seconds: Figure = None
    tokens_per_second: Figure = None
    peak_rss_bytes: Figure = None
    peak_gpu_bytes: Figure = None


class Report(_Part):
    """What a report must hold where it holds it at all; `docs/report.md` says what it means."""

    base: _Base
    recipe_sha256: Name | None = None
    data: _Data | None = None
    fidelity: _Fidelity | None = None
    reliance: _Reliance | None = None
    elsewhere: list[_Elsewhere] = []
    cost: _Cost | None = None
    versions: dict[str, Name] | None = None
    seeds: dict[str, int | None] | None = None
    local: list[Name] = []
    files: dict[str, Name] | None = None


def read_report_file(path: Path) -> dict[str, Any]:
    """Read a report. Raises InputError, which names the file, the key, its value and the fix."""
    content = read_mapping(path, "download it, or convert or evaluate again")
    try:
        Report.model_validate(content)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(map(str, problem["loc"])) or "the report"
        held = "is missing" if problem["type"] == "missing" else f"is {kind_of(problem['input'])} ({problem['input']!r:.60})"
        reason = "" if problem["type"] == "missing" else f": {problem['msg'][0].lower()}{problem['msg'][1:]}"
        raise InputError(f"{path}: {key} {held}{reason}; download it, or convert or evaluate again") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply to be a report; download it, or convert or evaluate again") from None
    return content
