"""The model card of a checkpoint: the template filled from the report, nothing typed by hand."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

CARD = "README.md"
REPOSITORY = "THIS_REPOSITORY"  # in a card that is not published yet: where it will be
TAG = "mxd-convert"  # by which checkpoints are found on the Hub
_PLOTS = {
    "plots/layers.png": "Rise of cross-entropy and reliance on the experts, by layer",
    "plots/training.png": "Training: FVU and idle experts",
}
_KINDS = {
    "mxd": "Mixture-of-Decoders",
    "random_gate": "Mixture-of-Decoders",
    "dense_twin": "dense twin",
    "transcoder": "transcoder",
    "skip_transcoder": "skip transcoder",
}
NOT_MEASURED = "not measured"


def template_folder() -> Path:
    """The folder of card templates: inside the wheel, or at the top of a checkout."""
    packaged = Path(__file__).parent.parent / "shipped" / "model_cards"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent.parent / "model_cards"


def write_card(folder: Path, report: dict[str, Any], recipe_yaml: str, base_on_hub: bool, full: Path | None = None) -> None:
    """Writes README.md into `folder`, of what stands there and in the report.

    base_on_hub: whether the base's name is a Hub id, which alone may stand in the metadata. full: of a delta, where the full checkpoint's files are.
    """
    files = full or folder
    config = json.loads((files / "config.json").read_text(encoding="utf-8"))["mxd"]
    optional = dict.fromkeys(("fidelity", "reliance", "data", "cost", "seeds", "versions"))
    report = {**optional, "edits": [], "steering": [], "elsewhere": [], "local": [], **report}
    recipe = yaml.safe_load(recipe_yaml) or {}
    indices = list(config["layers"])
    entry = config["layers"][indices[0]]
    title = f"{report['base']['model']} with {_KINDS[entry['kind']]} layers"
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)  # noqa: S701 (Markdown)
    environment.filters |= {"figure": _figure, "signed": _signed, "share": _share, "count": _count, "gib": _gib, "how": _how}
    text = environment.from_string((template_folder() / "template.md").read_text(encoding="utf-8")).render(
        metadata=_metadata(report, config, title, base_on_hub, full is not None).to_yaml(),
        title=title,
        report=report,
        recipe=recipe_yaml.strip(),
        local=report["local"],
        order=recipe.get("train", {}).get("order"),
        finish=recipe.get("train", {}).get("finish"),
        base_on_hub=base_on_hub,
        licence=_licence(report["base"]),
        indices=indices,
        first=indices[0],
        where=f"layer{'s' if len(indices) > 1 else ''} {_ranges([int(index) for index in indices])}",
        kind=entry["kind"],
        has_experts="n_experts" in entry,
        shape=_shape(entry),
        dead=_total(report, config, lambda layer, n_experts: layer["dead_fraction"] * n_experts),
        always_on=_total(report, config, lambda layer, n_experts: layer["always_on"]),
        plots=[
            ((files / path).relative_to(folder).as_posix(), caption)
            for path, caption in _PLOTS.items()
            if (files / path).is_file()
        ],
        delta=full is not None,
        own_code=bool(report["base"].get("own_code")),
        described=bool(report["base"].get("mlp")),
        base_argument="" if base_on_hub else ', base="BASE"',
        base_option="" if base_on_hub else " --base BASE",
    )
    ModelCard(re.sub(r"\n{3,}", "\n\n", text), ignore_metadata_errors=False).save(folder / CARD)


def _metadata(report: Mapping[str, Any], config: Mapping[str, Any], title: str, base_on_hub: bool, delta: bool) -> ModelCardData:
    base, indices = report["base"], list(config["layers"])
    entry = config["layers"][indices[0]]
    kinds = ["mxd", "mixture-of-decoders"] if entry["kind"] in ("mxd", "random_gate") else [entry["kind"].replace("_", "-")]
    text = report["data"]["train"]["path"] if report["data"] and report["data"].get("train") else None
    on_hub = text is not None and "data.train.path" not in report["local"]
    told = {
        "format": config["format_version"],
        "base": base["model"],
        "kind": entry["kind"],
        "layers": [int(index) for index in indices],
        "k": entry.get("k"),
        "experts": entry.get("n_experts"),
        "rise": report["fidelity"] and round(report["fidelity"]["delta_ce"], 4),
        "verdict": report["reliance"] and report["reliance"]["verdict"],
    }
    return ModelCardData(
        model_name=title,
        eval_results=_results(report),
        library_name="transformers",
        pipeline_tag="text-generation",
        license=base.get("license"),
        license_name=base.get("license_name"),
        license_link=base.get("license_link"),
        language=base.get("language"),
        tags=[TAG, *kinds, *(["mxd-delta"] if delta else []), "interpretability", "sparse-mlp"],
        base_model=base["model"] if base_on_hub else None,
        base_model_relation="finetune" if base_on_hub else None,
        datasets=[str(text)] if on_hub else None,
        mxd=told,
    )


def _results(report: Mapping[str, Any]) -> list[EvalResult] | None:
    """The measured results as the Hub's model-index has them."""
    if not report["fidelity"]:
        return None
    fidelity, reliance = report["fidelity"], report["reliance"]["layers"].values()
    figures = {
        "Rise of cross-entropy over the base (nats a token)": ("cross_entropy_rise", fidelity["delta_ce"]),
        "KL from the base (nats a token)": ("kl_divergence", fidelity["kl"]),
        "Same most likely token as the base": ("top1_agreement", fidelity["top1_agreement"]),
    }
    for name in ("gate_share", "identity_share", "routing_necessity"):
        values = [layer[name] for layer in reliance if layer[name] is not None]
        if values:
            figures[f"{name.replace('_', ' ').capitalize()}, lowest layer"] = (name, min(values))
    held_out = report["data"]["eval"]["path"]
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


def _licence(base: Mapping[str, Any]) -> str:
    if not base.get("license"):
        return "the base model's, whose card states none"
    name = base.get("license_name") or base["license"]
    return f"the base model's, {name}" + (f" ({base['license_link']})" if base.get("license_link") else "")


def _shape(entry: Mapping[str, Any]) -> str:
    if "n_experts" not in entry:
        return ""
    unit = "latents" if "transcoder" in entry["kind"] else "experts"
    active = f"{entry['k']} active a token" if entry.get("sparsity", "topk") == "topk" else "those with a positive gate active"
    return f"{entry['n_experts']:,} {unit} a layer, {active}."


def _total(report: Mapping[str, Any], config: Mapping[str, Any], of: Any) -> str:
    """A number of experts over all layers, as `12 of 3,000`."""
    if not report["fidelity"]:
        return NOT_MEASURED
    layers = report["fidelity"]["layers"]
    counts = {index: entry["n_experts"] for index, entry in config["layers"].items() if "n_experts" in entry}
    if any(index not in layers or layers[index].get("always_on") is None for index in counts):
        return NOT_MEASURED
    return f"{round(sum(of(layers[index], n) for index, n in counts.items())):,} of {sum(counts.values()):,}"


def _ranges(numbers: list[int]) -> str:
    """`0-3, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _how(order: Mapping[str, Any]) -> str:
    words = {"add": "its coefficient {:+g}", "set": "its coefficient set to {:g}", "scale": "its coefficient times {:g}"}
    return next(text.format(order[name]) for name, text in words.items() if name in order)


def _share(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.1%}"


def _figure(value: float | None, digits: int = 3) -> str:
    return NOT_MEASURED if value is None else f"{value:.{digits}f}"


def _signed(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:+.3f}"


def _count(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:,.0f}"


def _gib(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value / 2**30:.1f} GiB"
