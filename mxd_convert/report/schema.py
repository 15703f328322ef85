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
Finite = Annotated[float, Field(ge=-1e300, le=1e300)]
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
    gguf_file: Name | None = None
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


class Jacobian(Section):
    """Changes of a layer's output along small steps in one kind of direction, against those of the MLP's output."""

    cosine: Figure = None
    cosine_se: Figure = None
    relative_squared_error: Figure = None
    relative_squared_error_se: Figure = None


class TokenKind(Section):
    """Figures of one kind of token: text, special tokens, BOS, or the first position of a block.

    Of the model: rise and KL of the predictions at these tokens. Of a layer: its squared error over the squared norm of the MLP's
    output, and the size of that norm relative to text.
    """

    tokens: Count = None
    delta_ce: Figure = None
    delta_ce_se: Figure = None
    kl: Figure = None
    kl_se: Figure = None
    relative_squared_error: Figure = None
    relative_squared_error_se: Figure = None
    norm: Figure = None


class LayerFidelity(Section):
    """Fidelity of one layer. All layers are converted for the figures in place, only this one for the others.

    reason: why the FVU is missing.
    """

    delta_ce: Figure = None
    delta_ce_se: Figure = None
    fvu: Figure = None
    fvu_se: Figure = None
    fvu_with_bos: Figure = None
    fvu_with_bos_se: Figure = None
    fvu_in_place_local: Figure = None
    fvu_in_place_local_se: Figure = None
    fvu_in_place_teacher: Figure = None
    fvu_in_place_teacher_se: Figure = None
    l0: Figure = None
    l0_se: Figure = None
    dead_fraction: Figure = None
    always_on: Figure = None
    recovered_zero: Figure = None
    recovered_zero_se: Figure = None
    recovered_mean: Figure = None
    recovered_mean_se: Figure = None
    jacobian: dict[str, Jacobian] | None = None
    token_kinds: dict[str, TokenKind] | None = None
    reason: Name | None = None


class Variants(Section):
    """The tokens on which variants of single layers were measured."""

    tokens: Count = None
    documents: Count = None


class ByDocument(Section):
    """Figures of each document of the held-out text, to pair two evaluations of the same text."""

    tokens: list[Annotated[int, Field(ge=0, le=10**12)]]
    ce_base: list[Finite]
    ce_converted: list[Finite]
    kl: list[Finite]
    top1_agreement: list[Finite] = []


class Fidelity(Section):
    """Fidelity of the converted model to its base: cross-entropies in nats per token, and figures per layer.

    Keys that end in `_se` are standard errors over documents. reason: why figures are missing.
    """

    tokens: Annotated[int, Field(ge=0)]
    documents: Count = None
    ce_base: Figure
    ce_base_se: Figure = None
    ce_converted: Figure
    ce_converted_se: Figure = None
    delta_ce: Figure
    delta_ce_se: Figure = None
    kl: Figure
    kl_se: Figure = None
    top1_agreement: Figure
    top1_agreement_se: Figure = None
    ce_zero_ablation: Figure = None
    ce_zero_ablation_se: Figure = None
    ce_mean_ablation: Figure = None
    ce_mean_ablation_se: Figure = None
    recovered_zero: Figure = None
    recovered_zero_se: Figure = None
    recovered_mean: Figure = None
    recovered_mean_se: Figure = None
    compounding: Figure = None
    compounding_se: Figure = None
    reason: Name | None = None
    token_kinds: dict[str, TokenKind] | None = None
    variants: Variants | None = None
    by_document: ByDocument | None = None
    layers: Annotated[dict[Annotated[str, Field(pattern=r"^\d{1,6}$")], LayerFidelity], Field(min_length=1)]


class LayerReliance(Section):
    """Reliance of one layer on its two sides, experts and linear factor. reason: why shares are missing."""

    gate_share: Figure = None
    hidden_share: Figure = None
    product_share: Figure = None
    expert_share: Figure = None
    identity_share: Figure = None
    routing_necessity: Figure = None
    routing_necessity_se: Figure = None
    gain_dimensions: Figure = None
    output_dimensions: Figure = None
    experts_50: Figure = None
    experts_90: Figure = None
    effective_experts: Figure = None
    verdict: Name | None = None
    reason: Name | None = None


class Reliance(Section):
    """Reliance of the model on its experts. data: the text, if it is not the report's held-out text."""

    layers: dict[str, LayerReliance]
    verdict: Name
    sentence: Name | None = None
    dense_twin: dict[str, Figure] | None = None
    data: Text | None = None


class OtherText(Section):
    """Figures on another text, added by `eval --record`."""

    class Figures(Section):
        """Figures of the whole model."""

        tokens: Annotated[int, Field(ge=0)]
        delta_ce: Figure
        delta_ce_se: Figure = None
        ce_base: Figure = None
        ce_converted: Figure = None
        kl: Figure = None
        kl_se: Figure = None
        top1_agreement: Figure = None
        top1_agreement_se: Figure = None

    data: Text
    fidelity: Figures
    verdict: Name | None = None


class EvaluationCost(Section):
    """Time of an evaluation; forwards of the whole held-out text; passes through the model from a layer on."""

    seconds: Figure = None
    full_passes: Figure = None
    suffix_passes: Figure = None


class Cost(Section):
    """Time and memory of the run, and the steps at which it was resumed."""

    resumed_at_steps: list[int] = []
    train_seconds: Figure = None
    tokens_per_second: Figure = None
    peak_rss_bytes: Figure = None
    peak_gpu_bytes: Figure = None
    evaluation: EvaluationCost | None = None


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
