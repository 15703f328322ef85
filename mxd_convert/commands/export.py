"""`export`: layers as static transcoders in the layout of another tool, and activations for delphi."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mxd_convert.base_model.capture import harvest, observe
from mxd_convert.base_model.load import pick_device
from mxd_convert.checkpoint.read import new_folder, read_config, recorded_base
from mxd_convert.data.blocks import Blocks
from mxd_convert.errors import InputError, memory_guard
from mxd_convert.evaluation.progress import progress
from mxd_convert.export.circuit_tracer import CircuitTracer
from mxd_convert.export.delphi import SPLITS, SUMMARY, LayerCache, active_entries
from mxd_convert.export.job import Job
from mxd_convert.export.layout import Layout
from mxd_convert.export.losses import measure
from mxd_convert.export.sources import NO_MEMORY, batches, chosen_layers, find_base, hookpoint, load_converted, read_text
from mxd_convert.export.sparsify import Sparsify
from mxd_convert.export.surrogate import ConditionalMeans, is_exact, surrogate_of
from mxd_convert.files import temporary_sibling, write_json
from mxd_convert.modeling.layers_mxd import Coefficients
from mxd_convert.recipe.schema import MASKED

FIGURES = "mxd_surrogate.json"
LAYOUTS: dict[str, type[Layout]] = {layout.name: layout for layout in (Sparsify, CircuitTracer)}


def export_transcoder(
    checkpoint: str | Path,
    output: str | Path,
    layout: str,
    data: str | Path,
    tokens: int = 131_072,
    text_field: str = "text",
    layers: str | list[int] = "all",
    base: str | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint's layers as static transcoders in float32, and their losses as mxd_surrogate.json.

    A (skip) transcoder is exported exactly. An MxD is approximated: row n of the decoder is `c_n * E[u | n active]`, estimated on
    the first three quarters of the text. The losses are measured on the last quarter.

    Args:
        checkpoint: Folder of the converted checkpoint.
        output: Folder to write, new or empty.
        layout: "sparsify" or "circuit-tracer".
        data: Held-out text: a local file, folder or glob.
        tokens: Maximum number of tokens to read.
        text_field: Field with the text of each document.
        layers: Layer indices: [3, 4], "3,4", "0-2" or "all".
        base: Base model to use instead of the recorded one. If the recorded one isn't available, activations come from the
            converted model, and figures against the base are None.
        device: Torch device. None uses CUDA if available, else the CPU.
        quiet: Print no progress.

    Returns:
        The content of mxd_surrogate.json (docs/other-tools.md).

    Raises:
        InputError: The layout, layers, text or output folder can't be used.
    """
    if layout not in LAYOUTS:
        raise InputError(f"layout {layout!r}: expected one of {', '.join(LAYOUTS)}")
    form, checkpoint, output = LAYOUTS[layout](), Path(checkpoint), Path(output)
    config = read_config(checkpoint)
    entries, notes = chosen_layers(checkpoint, config, layers)
    form.check(config, entries)
    vocabulary = config.get_text_config().vocab_size
    with memory_guard(NO_MEMORY), new_folder(output, checkpoint) as folder, temporary_sibling(output) as scratch:
        blocks, mask = read_text(checkpoint, data, tokens, text_field, vocabulary, scratch)
        converted = load_converted(checkpoint)
        if converted.config.mxd.get("steering"):
            converted.set_steering([])
            notes.append("the checkpoint's steering preset is not included in the files or in the figures")
        original, missing = find_base(checkpoint, converted, base)
        target = pick_device(device)
        job = Job(converted.to(target), original if original is None else original.to(target), blocks, mask, list(entries))
        with progress(job.steps, quiet, "surrogates", "estimating surrogates and measuring their losses") as advance:
            never = _write_all(form, folder, job, advance)
            surrogates = {i: form.read(folder, i, job.hookpoints[i], layer) for i, layer in job.layers.items()}
            measured = measure(job, surrogates, advance)
        form.describe(folder, job.layers, job.hookpoints, str(recorded_base(config).get("model") or "unknown"))
        for index, figures in measured["layers"].items():
            figures["never_fired"] = never[int(index)]
        content = {
            "layout": layout,
            "checkpoint": checkpoint.resolve().name,
            "base": recorded_base(config),
            "data": {"path": blocks.info.path, "fingerprint": blocks.info.fingerprint, **job.text()},
            "activations": "converted" if original is None else "base",
            **measured,
            "notes": notes + missing + form.notes(entries),
        }
        write_json(folder / FIGURES, content)
    return content


def _write_all(form: Layout, folder: Path, job: Job, advance: Any) -> dict[int, int | None]:
    """Write every layer's surrogate. Return the number of experts that never fired by layer, or None for exact ones."""
    never: dict[int, int | None] = {}
    for index, layer in job.layers.items():
        if is_exact(layer):
            form.write(folder, index, job.hookpoints[index], surrogate_of(layer, layer.experts))
            never[index] = None
    for group in job.groups:
        means = {index: ConditionalMeans(job.layers[index]) for index in group}
        for batch in job.estimation:
            ids_BT = job.take(batch)
            counted_BT = job.counted(batch)
            for index, activations in harvest(job.source, [job.sites[i] for i in group], ids_BT).items():
                means[index].add(activations.inputs[counted_BT])
            advance()
        for index in group:
            layer, estimate = job.layers[index], means.pop(index)
            never[index] = estimate.never
            form.write(folder, index, job.hookpoints[index], surrogate_of(layer, estimate.decoder(), estimate.dense()))
    return never


def cache_activations(
    checkpoint: str | Path,
    output: str | Path,
    data: str | Path,
    tokens: int = 131_072,
    text_field: str = "text",
    layers: str | list[int] = "all",
    splits: int = SPLITS,
    mask_first: bool | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write the experts' coefficients on a text to `output`/latents, in the layout of delphi.

    Coefficients up to 1e-5 count as zero, as in delphi. Memory doesn't grow with the text.

    Args:
        checkpoint: Folder of the converted checkpoint.
        output: Folder to write, new or empty.
        data: Text: a local file, folder or glob.
        tokens: Maximum number of tokens to read.
        text_field: Field with the text of each document.
        layers: Layer indices: [3, 4], "3,4", "0-2" or "all".
        splits: Number of files per layer, at most the number of experts.
        mask_first: Leave out BOS tokens and the first position of each block. None: as in training.
        device: Torch device. None uses CUDA if available, else the CPU.
        quiet: Print no progress.

    Returns:
        The content of mxd_cache.json (docs/other-tools.md).

    Raises:
        InputError: The layers, splits, text or output folder can't be used.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    config = read_config(checkpoint)
    entries, notes = chosen_layers(checkpoint, config, layers)
    fewest = min(entry["n_experts"] for entry in entries.values())
    if not 1 <= splits <= fewest:
        raise InputError(f"splits = {splits}: expected a whole number from 1 to the number of experts, {fewest}")
    vocabulary = config.get_text_config().vocab_size
    with memory_guard(NO_MEMORY), new_folder(output, checkpoint) as folder, temporary_sibling(output) as scratch:
        blocks, mask = read_text(checkpoint, data, tokens, text_field, vocabulary, scratch)
        mask = mask if mask_first is None else ("bos" if mask_first else "none")
        model = load_converted(checkpoint)
        if model.config.mxd.get("steering"):
            notes.append("the checkpoint's steering preset was active, so it changes the activations of the layers above")
        model = model.to(pick_device(device))
        sizes = {index: entry["n_experts"] for index, entry in entries.items()}
        caches = {}
        for index, size in sizes.items():
            (scratch / str(index)).mkdir()
            caches[index] = LayerCache(scratch / str(index), size, splits, blocks)
        _fill(model, caches, blocks, mask, max(sizes.values()), quiet)
        settings = {
            "dataset_repo": blocks.info.path,
            "dataset_split": "",
            "dataset_name": "",
            "dataset_column": text_field,
            "batch_size": 1,
            "cache_ctx_len": blocks.context,
            "n_tokens": len(blocks) * blocks.context,
            "n_splits": splits,
            "model_name": str(checkpoint),
        }
        found = {}
        for index, cache in caches.items():
            layer_folder = folder / "latents" / hookpoint(model, index)
            cache.write(layer_folder, blocks)
            write_json(layer_folder / "config.json", settings)
            found[str(index)] = {"module": layer_folder.name, "n_experts": sizes[index], **cache.figures()}
        masked = f"{MASKED[mask]} left out"
        content = {
            "layout": "delphi",
            "checkpoint": checkpoint.resolve().name,
            "data": {
                "path": blocks.info.path,
                "fingerprint": blocks.info.fingerprint,
                "tokens": len(blocks) * blocks.context,
                "context": blocks.context,
                "masked": masked,
            },
            "layers": found,
            "notes": notes,
        }
        write_json(folder / SUMMARY, content)
    return content


def _fill(model: Any, caches: Mapping[int, "LayerCache"], blocks: Blocks, mask: str, n_experts: int, quiet: bool) -> None:
    layers = model.mxd_layers()
    steps = batches(0, len(blocks), blocks.context, len(blocks), n_experts)
    with progress(len(steps), quiet, "activations", "caching activations") as advance:
        for batch in steps:
            ids_BT = blocks.take(batch).to(model.device)
            counted_BT = blocks.counted(batch, mask).to(model.device)
            see = {index: partial(_add, cache, batch.start, counted_BT) for index, cache in caches.items()}
            observe(model, ids_BT, [(layers[index].expert_acts, see[index]) for index in caches])
            advance()


def _add(cache: "LayerCache", first: int, counted_BT: Tensor, _: Tensor, coefficients: Coefficients) -> None:
    block_P, position_P, expert_P, value_P = active_entries(coefficients, counted_BT)
    cache.add(block_P + first, position_P, expert_P, value_P)
