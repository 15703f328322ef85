"""`edit`: experts ablated or scaled for good, or steered by a preset, in a new checkpoint that says so; `eval --record`: figures of another text."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mxd_convert.base_model.load import load_tokenizer
from mxd_convert.checkpoint.labels import LABELS
from mxd_convert.checkpoint.provenance import file_hashes
from mxd_convert.checkpoint.read import (
    LOCAL,
    REPORT,
    check_new,
    load_checkpoint,
    new_folder,
    read_config,
    read_local,
    read_report,
    recipe_of,
    recorded_base,
)
from mxd_convert.commands.evaluate import evaluate
from mxd_convert.errors import InputError
from mxd_convert.evaluation.steering import checked_orders
from mxd_convert.files import write_json
from mxd_convert.report.card import write_card
from mxd_convert.report.schema import Elsewhere, parse_report

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
    check_new(output, Path(checkpoint))
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
    with new_folder(output, Path(checkpoint)) as work:
        model.save_pretrained(work)
        load_tokenizer(str(checkpoint)).save_pretrained(work)
        for name in _CARRIED:
            if (Path(checkpoint) / name).is_file():
                shutil.copyfile(Path(checkpoint) / name, work / name)
        if local := read_local(Path(checkpoint)).get("base"):  # not whose run it is: it is no longer that run's result
            write_json(work / LOCAL, {"base": local})
        _write_report(Path(checkpoint), work, model, data, text_field, tokens, base)
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
    earlier = read_report(source)
    before = {} if earlier is None else earlier.to_dict()
    recorded = recorded_base(model.config)
    content: dict[str, Any] = {
        "base": before.get("base") or {key: recorded.get(key) for key in ("model", "revision", "sha256")},
        **{key: before[key] for key in ("recipe_sha256", "data", "cost", "versions", "seeds", "local") if key in before},
        "edits": model.config.mxd.get("edits", []),
        "steering": model.config.mxd.get("steering", []),
    }
    if data is not None:
        figures = evaluate(work, data, tokens, text_field, base)
        content["data"] = {**content.get("data", {}), "eval": figures.pop("data")}
        content |= figures
        content["files"] = file_hashes(work)
        write_json(work / REPORT, content)
    write_card(work, parse_report(content, work / REPORT), recipe_of(work), base_on_hub=not recorded.get("local", True))


_OF_ANOTHER_TEXT = ("tokens", "ce_base", "ce_converted", "delta_ce", "kl", "top1_agreement")


def record(checkpoint: str | Path, figures: Mapping[str, Any]) -> None:
    """Adds an evaluation on another text than the run's to a checkpoint's report (`elsewhere`) and card.

    figures: as `evaluate` returns them; those of the same text from before are replaced. Raises InputError where there is no report to add to, or
    the text is the one that it was evaluated on.
    """
    folder = Path(checkpoint)
    config = read_config(folder)
    report = read_report(folder)
    if report is None or report.data is None or report.data.eval is None:
        raise InputError(
            f"{folder}: has no {REPORT} to record figures in; only checkpoints that were measured when they were made have one"
        )
    data = figures["data"]
    if data["fingerprint"] == report.data.eval.fingerprint:
        raise InputError(f"{data['path']}: is the text that {folder} was evaluated on; its figures are in the report already")
    others = [other for other in report.elsewhere if other.data.fingerprint != data["fingerprint"]]
    found = {"data": data, "fidelity": {key: figures["fidelity"][key] for key in _OF_ANOTHER_TEXT}}
    report.elsewhere = [*others, Elsewhere.model_validate(found)]
    write_json(folder / REPORT, report.to_dict())
    write_card(folder, report, recipe_of(folder), base_on_hub=not recorded_base(config).get("local", True))
