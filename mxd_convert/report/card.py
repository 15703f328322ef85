"""The model card of a checkpoint: the template, filled from the report.

A report may come from anyone, so every value from it is escaped. Only text marked as `_Ours` is inserted verbatim.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined, UndefinedError

from mxd_convert.checkpoint.read import REPORT
from mxd_convert.errors import InputError, first_line
from mxd_convert.escaping import code, fence, markdown, printable
from mxd_convert.evaluation import verdict
from mxd_convert.files import read_mapping, write_text
from mxd_convert.recipe.kinds import KINDS
from mxd_convert.recipe.load import parse_yaml
from mxd_convert.report.schema import Base, Report

CARD = "README.md"
REPOSITORY = "THIS_REPOSITORY"  # placeholder for the repository's id until the card is published
TAG = "mxd-convert"  # finds checkpoints on the Hub
_PLOTS = {
    "plots/layers.png": "Rise in cross-entropy and reliance on the experts, by layer",
    "plots/training.png": "Training: FVU and idle experts",
}
_LOCAL = re.compile(r"base\.model|data\.(train|eval)\.(sources\.\d+\.)?path")  # keys of a recipe that may name local files
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WEB = re.compile(r"https?://[^\s<>\"'`]+")
NOT_MEASURED = "not measured"
_IN_WORDS = {  # each verdict as a headline and its consequence
    verdict.MIXTURE: (
        "These layers are mixtures of decoders.",
        "The experts and the linear factor both matter, and so does their product: each expert is a linear map of the hidden units.",
    ),
    verdict.TRANSCODER: (
        "These layers are transcoders in all but name.",
        "The linear factor is nearly constant, so each expert adds a fixed vector, like a latent of a transcoder.",
    ),
    verdict.DENSE_LAYER: (
        "These layers are dense layers in all but name.",
        "The experts' gain is nearly constant, so the linear factor does the work.",
    ),
    verdict.NOT_SHOWN: (
        "The experts are not shown to matter.",
        "Most of the output, or of its benefit to the model, does not depend on which experts fire.",
    ),
    verdict.MIXED: ("These layers are mixed.", "The section on reliance says what each of them is."),
}


class _Ours(str):
    """Trusted text, inserted into a card verbatim."""


def template_folder() -> Path:
    """Return the folder of card templates: inside the wheel, or at the top of a checkout."""
    packaged = Path(__file__).parent.parent / "shipped" / "model_cards"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent.parent / "model_cards"


def write_card(folder: Path, report: Report, recipe_yaml: str, base_on_hub: bool, full: Path | None = None) -> None:
    """Write README.md into `folder`, from the report and the files of the checkpoint.

    Args:
        folder: the folder of the checkpoint or delta.
        report: the report.
        recipe_yaml: the text of recipe.yaml.
        base_on_hub: whether the base's name is a Hub id; only then the metadata names it.
        full: for a delta, the folder with the full checkpoint's files.

    Raises:
        InputError: report, config or recipe lacks a value that the card needs, or has one of another form.
    """
    files = full or folder
    config = _layers_of(files / "config.json")
    train = _training_of(files / "recipe.yaml", recipe_yaml)
    plots = [
        ((files / path).relative_to(folder).as_posix(), caption) for path, caption in _PLOTS.items() if (files / path).is_file()
    ]
    with _understood(files / REPORT):
        text = _filled(report, config, recipe_yaml.strip(), train, base_on_hub, full is not None, plots)
        card = str(ModelCard(re.sub(r"\n{3,}", "\n\n", text), ignore_metadata_errors=False))
    write_text(folder / CARD, card)


def _filled(
    report: Report,
    config: Mapping[str, Any],
    recipe: str,
    train: Mapping[str, Any],
    base_on_hub: bool,
    delta: bool,
    plots: list[tuple[str, str]],
) -> str:
    """Return the filled template."""
    indices = sorted(config["layers"], key=int)
    entry = config["layers"][indices[0]]
    title = f"{report.base.model} with {KINDS[entry['kind']].family} layers"
    environment = Environment(  # noqa: S701 (Markdown)
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, finalize=_escaped
    )
    environment.filters |= {"figure": _figure, "signed": _signed, "share": _share, "count": _count, "gib": _gib, "how": _how}
    environment.filters["measured"] = _measured
    environment.filters["code"] = lambda value: _Ours(code(str(value)))
    return environment.from_string((template_folder() / "template.md").read_text(encoding="utf-8")).render(
        metadata=_Ours(_metadata(report, config, title, base_on_hub, delta).to_yaml()),
        title=title,
        report=report,
        recipe=_Ours(recipe),
        fence=_Ours(fence(recipe)),
        local=[_Ours(key) for key in report.local if _LOCAL.fullmatch(key)],
        order=train.get("order"),
        joint=train.get("joint", train.get("finish")),  # older recipes call the key `finish`
        terms={name: train.get(name) or 0.0 for name in ("balance", "jacobian")},
        base_on_hub=base_on_hub,
        licence=_licence(report.base),
        indices=indices,
        first=indices[0],
        where=f"layer{'s' if len(indices) > 1 else ''} {_ranges([int(index) for index in indices])}",
        kind=entry["kind"],
        formula=_Ours(KINDS[entry["kind"]].formula(bool(entry.get("shared_expert")), bool(entry.get("skip")))),
        shared_expert=bool(entry.get("shared_expert")),
        has_experts="n_experts" in entry,
        shape=_shape(entry),
        dead=_total(report, config, lambda layer, n_experts: layer.dead_fraction * n_experts),
        always_on=_total(report, config, lambda layer, n_experts: layer.always_on),
        plots=plots,
        delta=delta,
        in_words=_IN_WORDS.get(report.reliance.verdict) if report.reliance else None,
        hidden=report.reliance is not None and any(layer.hidden_share is not None for layer in report.reliance.layers.values()),
        jacobian=report.fidelity is not None and any(layer.jacobian for layer in report.fidelity.layers.values()),
        own_code=report.base.own_code,
        described=bool(report.base.mlp),
        base_argument=_Ours("" if base_on_hub else ', base="BASE"'),
        base_option=_Ours("" if base_on_hub else " --base BASE"),
    )


def _escaped(value: Any) -> str:
    """Return the text of a value in the card, escaped unless it is ours. Undefined values raise here."""
    text = str(value)
    return text if isinstance(value, _Ours) else markdown(text)


@contextmanager
def _understood(report: Path) -> Iterator[None]:
    """Turn errors from missing or malformed values of a report into an InputError."""
    try:
        yield
    except InputError:
        raise
    except (UndefinedError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else first_line(error, 200)
        what = what.replace("'dict object' has no attribute", "has no")
        raise InputError(f"{report}: {what}, which the card needs. Convert or evaluate again.") from None


def _layers_of(path: Path) -> Mapping[str, Any]:
    """Return the `mxd` entry of a config.json. Raises InputError if it has no layers of known kinds."""
    mxd = read_mapping(path).get("mxd")
    layers = mxd.get("layers") if isinstance(mxd, Mapping) else None
    if not isinstance(mxd, Mapping) or not isinstance(layers, Mapping) or not layers:
        raise InputError(f"{path}: has no converted layers. Download it or convert again.")
    for index, entry in layers.items():
        known = isinstance(entry, Mapping) and isinstance(entry.get("kind"), str) and entry["kind"] in KINDS
        counted = known and all(type(entry.get(name, 0)) is int for name in ("n_experts", "k"))
        if not (counted and re.fullmatch(r"[0-9]{1,6}", index)):
            raise InputError(f"{path}: mxd.layers: {index!r:.40}: not a converted layer. Download it or convert again.")
    return mxd


def _training_of(path: Path, recipe_yaml: str) -> Mapping[str, Any]:
    """Return the section `train` of a recipe. Raises InputError if the recipe isn't readable."""
    try:
        recipe = parse_yaml(recipe_yaml)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a readable recipe ({first_line(error, 120)}). Download it or convert again.") from None
    train = recipe.get("train") if isinstance(recipe, Mapping) else None
    return train if isinstance(train, Mapping) else {}


def _metadata(report: Report, config: Mapping[str, Any], title: str, base_on_hub: bool, delta: bool) -> ModelCardData:
    base, indices = report.base, sorted(config["layers"], key=int)
    entry = config["layers"][indices[0]]
    text = report.data.train.path if report.data and report.data.train else None
    on_hub = "data.train.path" not in report.local and _REPOSITORY.fullmatch(str(text))
    base_on_hub = base_on_hub and _REPOSITORY.fullmatch(base.model) is not None
    delta_ce = _number(report.fidelity.delta_ce) if report.fidelity else None
    summary = {
        "format": version if type(version := config.get("format_version")) is int else None,
        "base": _line(base.model),
        "kind": entry["kind"],
        "layers": [int(index) for index in indices],
        "k": entry.get("k"),
        "experts": entry.get("n_experts"),
        "delta_ce": None if delta_ce is None else round(delta_ce, 4),
        "verdict": report.reliance and _line(report.reliance.verdict),
    }
    language = base.language
    return ModelCardData(
        model_name=_line(title),
        eval_results=_results(report),
        library_name="transformers",
        pipeline_tag="text-generation",
        license=_line(base.license),
        license_name=_line(base.license_name),
        license_link=_link(base.license_link),
        language=[line for one in language if (line := _line(one))] or None if isinstance(language, list) else _line(language),
        tags=[TAG, *KINDS[entry["kind"]].tags, *(["mxd-delta"] if delta else []), "interpretability", "sparse-mlp"],
        base_model=base.model if base_on_hub else None,
        base_model_relation="finetune" if base_on_hub else None,
        datasets=[str(text)] if on_hub else None,
        mxd=summary,
    )


def _line(value: Any) -> str | None:
    """Return a report's text as one printable line for the metadata; None for other values."""
    return printable(" ".join(value.split())) or None if isinstance(value, str) else None


def _link(value: Any) -> str | None:
    return value if isinstance(value, str) and _WEB.fullmatch(value) else None


def _results(report: Report) -> list[EvalResult] | None:
    """Return the measured results in the form of the Hub's model-index; None if something wasn't measured."""
    if report.fidelity is None or report.reliance is None or report.data is None or report.data.eval is None:
        return None
    fidelity, reliance = report.fidelity, report.reliance.layers.values()
    figures = {
        "Rise in cross-entropy over the base (nats per token)": ("delta_ce", _number(fidelity.delta_ce)),
        "KL from the base (nats per token)": ("kl", _number(fidelity.kl)),
        "Same most likely token as the base": ("top1_agreement", _number(fidelity.top1_agreement)),
    }
    for name in ("gate_share", "hidden_share", "product_share", "identity_share", "routing_necessity"):
        values = [value for layer in reliance if (value := _number(getattr(layer, name))) is not None]
        if values:
            figures[f"{name.replace('_', ' ').capitalize()}, lowest layer"] = (name, min(values))
    held_out = _line(report.data.eval.path) or "text"
    kind = re.sub(r"\W+", "-", Path(held_out).name.split(".")[0]) or "text"
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=kind,
            dataset_name=f"{held_out} (held out)",
            metric_type=metric,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for name, (metric, value) in figures.items()
        if value is not None
    ]


def _licence(base: Base) -> str:
    licence, link = _line(base.license), _link(base.license_link)
    if licence is None:
        return "that of the base model, whose card states none"
    return f"that of the base model, {_line(base.license_name) or licence}" + (f" ({link})" if link else "")


def _shape(entry: Mapping[str, Any]) -> str:
    if "n_experts" not in entry:
        return ""
    active = (
        f"{entry['k']} active per token" if entry.get("sparsity", "topk") == "topk" else "active if the gate value is positive"
    )
    return f"{entry['n_experts']:,} {KINDS[entry['kind']].unit}s per layer, {active}."


def _total(report: Report, config: Mapping[str, Any], of: Any) -> str:
    """Return a number of experts over all layers, such as `12 of 3,000`. of: (figures, n_experts) of a layer -> its number."""
    if report.fidelity is None:
        return NOT_MEASURED
    layers = report.fidelity.layers
    counts = {index: entry["n_experts"] for index, entry in config["layers"].items() if "n_experts" in entry}
    if any(getattr(layers.get(index), name, None) is None for index in counts for name in ("always_on", "dead_fraction")):
        return NOT_MEASURED
    return f"{round(sum(of(layers[index], n) for index, n in counts.items())):,} of {sum(counts.values()):,}"


def _ranges(numbers: list[int]) -> str:
    """Return rising numbers as ranges, such as `0-3, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _how(order: Mapping[str, Any]) -> str:
    forms = {"add": "its coefficient {:+g}", "set": "its coefficient set to {:g}", "scale": "its coefficient times {:g}"}
    name = next((name for name in forms if name in order), None)
    if name is None:
        raise ValueError(f"steering {str(order)[:60]!r} has none of add, set and scale")
    return forms[name].format(_number(order[name]))


def _number(value: Any) -> float | None:
    """Return a figure of a report; None if it wasn't measured or isn't finite. Raises ValueError for other values."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ValueError(f"{str(value)[:60]!r} is not a number")
    return value if value is not None and math.isfinite(value) else None


def _measured(section: Any, name: str, form: str = ".3f") -> str:
    """Return a figure of a section, with its standard error if it has one: `0.123 ± 0.004`."""
    value, error = (_number(getattr(section, key, None)) for key in (name, f"{name}_se"))
    shown = _shown(value, form)
    return shown if value is None or error is None else f"{shown} ± {format(error, form.lstrip('+'))}"


def _share(value: Any) -> str:
    return _shown(value, ".1%")


def _figure(value: Any, digits: int = 3) -> str:
    return _shown(value, f".{digits}f")


def _signed(value: Any) -> str:
    return _shown(value, "+.3f")


def _count(value: Any) -> str:
    return _shown(value, ",.0f")


def _gib(value: Any) -> str:
    known = _number(value)
    return NOT_MEASURED if known is None else f"{known / 2**30:.1f} GiB"


def _shown(value: Any, form: str) -> str:
    known = _number(value)
    return NOT_MEASURED if known is None else format(known, form)
