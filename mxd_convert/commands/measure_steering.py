"""`measure-steering`: the effect of steering, written as a table, samples and a plot."""

import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from mxd_convert.base_model.load import load_tokenizer
from mxd_convert.checkpoint.read import checkpoint_settings, load_checkpoint, original_of
from mxd_convert.commands.generate import encode_prompt
from mxd_convert.data.blocks import check_vocabulary, prepare_eval
from mxd_convert.errors import InputError
from mxd_convert.evaluation.progress import progress
from mxd_convert.evaluation.steering_effect import Effect, SteeringEffect, find_experts, measure
from mxd_convert.files import check_output, move_into_place, replacing, temporary_sibling, write_csv, write_json
from mxd_convert.recipe.texts import EvalText
from mxd_convert.report.plots import save_figure
from mxd_convert.report.write import versions

_COLUMNS = ("layer", "expert", "strength", "coefficient", "kl", "perplexity", "ngrams", "embedding")


def measure_steering(
    checkpoint: str | Path,
    data: str | Path,
    output: str | Path,
    experts: Sequence[tuple[int, int]] = (),
    count: int = 20,
    strengths: Sequence[float] = (0.5, 1.0, 2.0, 4.0, 8.0),
    prompt: str = "",
    samples: int = 10,
    new_tokens: int = 32,
    contexts: int = 32,
    text_field: str = "text",
    tokens: int = 32_768,
    seed: int = 0,
    base: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Measure the effect of adding to experts' coefficients.

    Writes steering.csv, steering.json, samples.jsonl and steering.png to `output`.

    Args:
        checkpoint: Folder of the converted checkpoint.
        data: Held-out text: a local file, folder or glob.
        output: Folder to write, which must not exist.
        experts: (layer, expert) pairs. Empty: `count` experts drawn at random among those that are active on the text.
        count: Number of experts to draw.
        strengths: Amounts to add, in units of the 99th percentile of an expert's active coefficients on the text.
        prompt: Prompt of the samples. Empty: the BOS token.
        samples: Number of samples per expert and strength.
        new_tokens: Number of tokens per sample.
        contexts: Number of held-out contexts after which the next-token distribution is compared.
        text_field: Field with the text of each document.
        tokens: Maximum number of tokens to take coefficients from.
        seed: Random seed of the experts drawn and of the samples.
        base: Base model to use instead of the recorded one.
        quiet: Print no progress.

    Returns:
        A dict with `settings`, `unsteered` and `effects`.

    Raises:
        InputError: An argument is out of range, or the checkpoint, text, experts or output folder can't be used.
    """
    folder = Path(output)
    if folder.exists():
        raise InputError(f"--output {folder}: exists already. Choose another folder.")
    check_output(folder)
    if not strengths or not all(0 < abs(strength) <= 1e6 for strength in strengths):
        raise InputError(f"--strengths {', '.join(map(str, strengths))}: expected numbers other than 0, such as 1,2,4")
    for name, number, least in (
        ("--samples", samples, 2),
        ("--new-tokens", new_tokens, 2),
        ("--contexts", contexts, 1),
        ("--count", count, 1),
    ):
        if number < least:
            raise InputError(f"{name} {number}: expected at least {least}")
    context, mask = checkpoint_settings(Path(checkpoint))
    if tokens < context:
        raise InputError(f"--tokens {tokens}: fewer than one block of {context} tokens. Set --tokens to {context} or more.")
    model, tokenizer = load_checkpoint(checkpoint, dtype="float32", finite=True), load_tokenizer(str(checkpoint))
    original = original_of(checkpoint, model, base)
    original = original.float()
    with tempfile.TemporaryDirectory() as scratch:
        source = EvalText(path=str(Path(data).expanduser().absolute()), text=text_field, tokens=tokens)
        blocks = prepare_eval(source, context, tokenizer, Path(scratch))
        check_vocabulary(blocks.ids, original.config.get_text_config().vocab_size)
        chosen = find_experts(model, blocks, experts, count, seed, mask)
        ids = blocks.take(slice(0, contexts))
        prompt_T = encode_prompt(tokenizer, prompt, model, new_tokens)["input_ids"][0]
        effect = SteeringEffect(model, original, ids, prompt_T, samples, new_tokens, seed)
        with progress(len(chosen) * len(strengths), quiet, "steering") as advance:
            found = measure(effect, chosen, strengths, advance)
        text = {"path": blocks.info.path, "fingerprint": blocks.info.fingerprint, "tokens": len(blocks) * context}
    result = {
        "settings": {
            "data": text,
            "prompt": prompt,
            "samples": samples,
            "new_tokens": new_tokens,
            "contexts": len(ids),
            "seed": seed,
            "experts": [asdict(expert) for expert in chosen],
            "versions": versions(),
        },
        "unsteered": _row(found[0]),
        "effects": [_row(one) for one in found[1:]],
    }
    with temporary_sibling(folder) as temporary:
        work = temporary / "steering"
        work.mkdir()
        _write(work, result, found, tokenizer)
        move_into_place(work, folder, temporary)
    return result


def _row(effect: Effect) -> dict[str, Any]:
    return {name: None if isinstance(value := getattr(effect, name), float) and math.isnan(value) else value for name in _COLUMNS}


def _write(folder: Path, result: dict[str, Any], found: Sequence[Effect], tokenizer: Any) -> None:
    write_json(folder / "steering.json", result)
    write_csv(folder / "steering.csv", _COLUMNS, [result["unsteered"], *result["effects"]])
    with replacing(folder / "samples.jsonl") as temporary, temporary.open("w", encoding="utf-8") as file:
        for effect in found:
            for sample in effect.samples:
                row = {
                    "layer": effect.layer,
                    "expert": effect.expert,
                    "strength": effect.strength,
                    "text": tokenizer.decode(sample),
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    _plot(result, folder / "steering.png")


def _plot(result: dict[str, Any], path: Path) -> None:
    """Plot the effect on the next token against strength (left), and similarity of samples against fluency (right).

    The right plot has one point per expert and strength.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 4.0), layout="constrained")
    rows = [row for row in result["effects"] if row["embedding"] is not None]
    by_expert: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    by_strength: dict[float, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_expert[row["layer"], row["expert"]].append(row)
        by_strength[row["strength"]].append(row)
    for line in by_expert.values():
        left.plot([row["strength"] for row in line], [max(row["kl"], 1e-9) for row in line], color="#31688e", alpha=0.25, lw=1)
    strengths = sorted(by_strength)
    middle = [_median([max(row["kl"], 1e-9) for row in by_strength[strength]]) for strength in strengths]
    left.plot(strengths, middle, color="#440154", marker="o", ms=4, label="median expert")
    left.set_yscale("log")
    if min(strengths) > 0:
        left.set_xscale("log", base=2)
        left.set_xticks(strengths, [f"{strength:g}" for strength in strengths])
    left.set_xlabel("strength (99th percentiles of the expert's coefficient)")
    left.set_ylabel("KL of the next token, nats")
    left.set_title("effect on held-out contexts", fontsize=10)
    left.legend(fontsize=8, frameon=False)
    colours = plt.get_cmap("viridis")
    for number, strength in enumerate(strengths):
        points = by_strength[strength]
        colour = colours(0.9 * number / max(1, len(strengths) - 1))
        at = [row["perplexity"] for row in points], [row["embedding"] for row in points]
        right.scatter(*at, color=colour, s=16, alpha=0.75, lw=0, label=f"{strength:g}")
    plain = result["unsteered"]
    right.scatter([plain["perplexity"]], [plain["embedding"]], marker="*", s=110, color="#b22222", label="not steered", zorder=4)
    right.set_xscale("log")
    right.set_xlabel("base model's perplexity of the samples (lower is more fluent)")
    right.set_ylabel("similarity of samples (cosine of mean states)")
    right.set_title("consistency against fluency", fontsize=10)
    right.legend(fontsize=7, frameon=False, title="strength", title_fontsize=7)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path, dpi=150)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
