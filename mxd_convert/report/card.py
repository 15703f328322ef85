"""The model card of a checkpoint: the template filled from the report, nothing typed by hand."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined

TAGS = ["mxd", "mixture-of-decoders", "interpretability", "sparse-mlp"]


def template_folder() -> Path:
    """The folder of card templates: inside the wheel, or at the top of a checkout."""
    packaged = Path(__file__).parent.parent / "shipped" / "model_cards"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent.parent / "model_cards"


def write_card(folder: Path, report: dict[str, Any], recipe_yaml: str, base_on_hub: bool) -> None:
    """Writes README.md into `folder`. base_on_hub: whether the base's name is a Hub id, which alone may stand in the metadata."""
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
        base_model=report["base"]["model"] if base_on_hub else None,
        base_model_relation="finetune" if base_on_hub else None,
    )
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)  # noqa: S701 (Markdown)
    environment.filters |= {"figure": _figure, "share": _share, "how": _how}
    template = environment.from_string((template_folder() / "template.md").read_text(encoding="utf-8"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    full: dict[str, Any] = {"edits": [], "steering": [], "fidelity": None, "data": None, "cost": None, **report}
    indices = list(config["mxd"]["layers"])
    kind = config["mxd"]["layers"][indices[0]]["kind"]
    text = template.render(
        metadata=data.to_yaml(), report=full, recipe=recipe_yaml.strip(), base_on_hub=base_on_hub, indices=indices, kind=kind
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _how(order: Mapping[str, Any]) -> str:
    words = {"add": "its coefficient {:+g}", "set": "its coefficient set to {:g}", "scale": "its coefficient times {:g}"}
    return next(text.format(order[name]) for name, text in words.items() if name in order)


def _share(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1%}"


def _figure(value: float | None, digits: int = 3) -> str:
    return "not measured" if value is None else f"{value:.{digits}f}"
