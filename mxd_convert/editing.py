"""`edit`: experts ablated or scaled for good, or steered by a preset, in a new checkpoint that says so."""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mxd_convert.base import load_tokenizer, quiet
from mxd_convert.checkpoint import LOCAL, REPORT, load_checkpoint, read_local, recorded_base
from mxd_convert.errors import InputError, disk_guard
from mxd_convert.evaluation import evaluate
from mxd_convert.evaluation.steering import checked_orders
from mxd_convert.labels import LABELS
from mxd_convert.report import write_card

_CARRIED = ("recipe.yaml", "training_log.jsonl", LABELS)


def edit(
    checkpoint: str | Path,
    output: str | Path,
    edits: Sequence[Mapping[str, Any]] = (),
    steering: Sequence[Mapping[str, Any]] = (),
    data: str | Path | None = None,
    text_field: str = "text",
    tokens: int = 262_144,
    base: str | None = None,
) -> Path:
    """Writes a copy of a checkpoint with experts changed, and a card that says which.

    edits: {"layer", "expert", and "ablate": True or "scale": factor}; the factor goes into the expert's row of C for good, which is what
    steering with it does at every position. steering: orders of a preset that is added to config.json, as `steer` takes them. data: held-out text
    on which the copy is measured; without it the copy has no mxd_report.json, since the old figures are another model's. Raises InputError.
    """
    output = Path(output)
    if Path(checkpoint).resolve() in output.resolve().parents:
        raise InputError(f"--output {output}: lies inside the checkpoint; choose another folder")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output {output}: exists already; choose another folder")
    if not edits and not steering:
        raise InputError("edit: nothing to change; give --ablate L:E, --scale L:E:C or --steer L:E:+C")
    model = load_checkpoint(checkpoint)
    orders = checked_orders(model, edits)
    for order in orders:
        if "ablate" not in order and "scale" not in order:
            raise InputError(
                f"edit of expert {order['expert']} of layer {order['layer']}: can be ablated or scaled for good, nothing else"
            )
    preset = checked_orders(model, steering)
    _apply(model, orders, preset)
    output.parent.mkdir(parents=True, exist_ok=True)
    with disk_guard(output), quiet(), tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        work = Path(scratch) / "checkpoint"
        model.save_pretrained(work)
        load_tokenizer(str(checkpoint)).save_pretrained(work)
        for name in _CARRIED:
            if (Path(checkpoint) / name).is_file():
                shutil.copyfile(Path(checkpoint) / name, work / name)
        if local := read_local(Path(checkpoint)).get("base"):  # not whose run it is: it is no longer that run's result
            (work / LOCAL).write_text(json.dumps({"base": local}, indent=2) + "\n")
        _write_report(Path(checkpoint), work, model, data, text_field, tokens, base)
        if output.exists():
            output.rmdir()
        work.rename(output)
    return output


@torch.no_grad()
def _apply(model: Any, orders: list[dict[str, Any]], preset: list[dict[str, Any]]) -> None:
    layers = model.mxd_layers()
    for order in orders:
        layers[order["layer"]].experts[order["expert"]] *= order.get("scale", 0.0)
    if orders:
        done = [{key: value for key, value in order.items() if key != "positions"} for order in orders]
        model.config.mxd = {**model.config.mxd, "edits": [*model.config.mxd.get("edits", []), *done]}
    if preset:
        model.set_steering([*model.config.mxd.get("steering", []), *preset])


def _write_report(
    source: Path, work: Path, model: Any, data: str | Path | None, text_field: str, tokens: int, base: str | None
) -> None:
    """The card, and the report where the copy is measured. What the source's report says of base, text and training stays true."""
    before = json.loads((source / REPORT).read_text()) if (source / REPORT).is_file() else {}
    recorded = recorded_base(model.config)
    report = {
        "base": before.get("base") or {key: recorded.get(key) for key in ("model", "revision", "sha256")},
        **{key: before[key] for key in ("recipe_sha256", "data", "cost", "versions", "seeds") if key in before},
        "edits": model.config.mxd.get("edits", []),
        "steering": model.config.mxd.get("steering", []),
    }
    if data is not None:
        figures = evaluate(work, data, tokens, text_field, base)
        report["data"] = {**report.get("data", {}), "eval": figures.pop("data")}
        report |= figures
        (work / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    recipe = (work / "recipe.yaml").read_text() if (work / "recipe.yaml").is_file() else ""
    write_card(work, report, recipe, base_on_hub=not recorded.get("local", True))
