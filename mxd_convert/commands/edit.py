"""`edit`: a new checkpoint with experts ablated, scaled or steered. `eval --record`: figures of another text in the report."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mxd_convert.base_model.load import copy_processor, load_tokenizer
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
from mxd_convert.report.schema import Fidelity, OtherText, Reliance, parse_report

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
    """Write a copy of a checkpoint with changed experts, and a model card that lists the changes.

    Args:
        checkpoint: Folder of the converted checkpoint.
        output: Folder to write, new or empty.
        edits: Permanent edits: dicts with `layer`, `expert`, and `ablate` (True) or `scale` (a factor). The factor multiplies the
            expert's row of C, which equals steering with it at every position.
        steering: Steering orders to add to the preset in config.json, as `parse_steering` returns them.
        data: Held-out text to evaluate the copy on. None: no mxd_report.json is written, because the old figures don't apply.
        text_field: Field with the text of each document.
        tokens: Maximum number of tokens to evaluate on.
        base: Base model to use instead of the recorded one.

    Returns:
        The folder written.

    Raises:
        InputError: There is nothing to change, an edit is invalid, or an input or output can't be used.
    """
    output = Path(output)
    check_new(output, Path(checkpoint))
    if not edits and not steering:
        raise InputError("edit: nothing to change. Use --ablate L:E, --scale L:E:C or --steer L:E:+C.")
    model = load_checkpoint(checkpoint)
    orders = checked_orders(model, edits)
    for order in orders:
        if "ablate" not in order and "scale" not in order:
            raise InputError(
                f"edit of expert {order['expert']} of layer {order['layer']}: expected ablate or scale. Pass other changes as steering."
            )
    preset = checked_orders(model, steering)
    _apply(model, orders, preset)
    with new_folder(output, Path(checkpoint)) as work:
        model.save_pretrained(work)
        load_tokenizer(str(checkpoint)).save_pretrained(work)
        copy_processor(str(checkpoint), work)
        for name in _CARRIED:
            if (Path(checkpoint) / name).is_file():
                shutil.copyfile(Path(checkpoint) / name, work / name)
        if local := read_local(Path(checkpoint)).get("base"):  # without the run's own entries: the copy isn't its result
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
    """Write the card, and the report if `data` is given.

    Base, training text, cost and versions are copied from the source's report, because they still apply.
    """
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
        content["cost"] = {**content.get("cost", {}), **figures.pop("cost")}
        content |= figures
        content["files"] = file_hashes(work)
        write_json(work / REPORT, content)
    write_card(work, parse_report(content, work / REPORT), recipe_of(work), base_on_hub=not recorded.get("local", True))


_OF_ANOTHER_TEXT = (
    "tokens",
    "ce_base",
    "ce_converted",
    "delta_ce",
    "delta_ce_se",
    "kl",
    "kl_se",
    "top1_agreement",
    "top1_agreement_se",
)


def record(checkpoint: str | Path, figures: Mapping[str, Any]) -> None:
    """Add an evaluation on another text to a checkpoint's report (`elsewhere`) and card.

    Earlier figures of the same text are replaced. A report of an earlier version, without hidden shares, gets the reliance figures
    and the verdict of this evaluation. On its own held-out text, fidelity is replaced too.

    Args:
        checkpoint: Folder of the converted checkpoint.
        figures: Result of `evaluate`.

    Raises:
        InputError: The checkpoint has no report, or the report has the figures already.
    """
    folder = Path(checkpoint)
    config = read_config(folder)
    report = read_report(folder)
    if report is None or report.data is None or report.data.eval is None:
        raise InputError(
            f"{folder}: has no {REPORT} to record figures in. Use a checkpoint written by `run`, or by `edit` with --data."
        )
    if "compounding" not in figures["fidelity"]:
        raise InputError("--record: a quick evaluation lacks figures that a report has. Remove --quick.")
    data = figures["data"]
    own = data["fingerprint"] == report.data.eval.fingerprint
    measured = report.reliance is not None and all(
        "hidden_share" in layer.model_fields_set for layer in report.reliance.layers.values()
    )
    if own and measured:
        raise InputError(
            f"{data['path']}: {folder} was evaluated on this text, and its report has the figures already. Record another text."
        )
    if not measured:
        twin = None if report.reliance is None else report.reliance.dense_twin  # an evaluation has none
        other_text = {} if own else {"data": data}
        report.reliance = Reliance.model_validate({**figures["reliance"], "dense_twin": twin, **other_text})
    if own:
        report.fidelity = Fidelity.model_validate(figures["fidelity"])
    else:
        others = [other for other in report.elsewhere if other.data.fingerprint != data["fingerprint"]]
        fidelity = {key: figures["fidelity"][key] for key in _OF_ANOTHER_TEXT}
        found = {"data": data, "fidelity": fidelity, "verdict": figures["reliance"]["verdict"]}
        report.elsewhere = [*others, OtherText.model_validate(found)]
    write_json(folder / REPORT, report.to_dict())
    write_card(folder, report, recipe_of(folder), base_on_hub=not recorded_base(config).get("local", True))
