"""`probe`: classify labelled documents by single experts, compared with neurons, latents, a random gate and all experts."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mxd_convert.base_model.families import find_sites
from mxd_convert.base_model.load import load_tokenizer, pick_device
from mxd_convert.base_model.swap import check_converted
from mxd_convert.checkpoint.read import load_checkpoint, original_of, read_config, recorded_base
from mxd_convert.data.labelled import MIN_DOCUMENTS, Labelled, check_classes, read_labelled
from mxd_convert.errors import InputError, memory_guard
from mxd_convert.evaluation.probes import fit as probing
from mxd_convert.evaluation.probes.pooling import (
    Array,
    Documents,
    Matrix,
    coefficients_of,
    encode_documents,
    hidden_units,
    pool,
    random_coefficients,
)
from mxd_convert.evaluation.probes.results import Family, probe_families, whole_vector_of
from mxd_convert.evaluation.progress import progress
from mxd_convert.recipe.kinds import KINDS
from mxd_convert.recipe.schema import layer_indices
from mxd_convert.report.probe import finished_probe, probe_folder, write_probe
from mxd_convert.report.write import versions

DOCUMENTS = 500  # largest number per class
TOKENS = 128  # largest number per document; the default context of recipes
_MEMORY = "out of memory: lower --documents, or probe fewer layers at a time with --layers"


@dataclass(frozen=True)
class _Checkpoint:
    """A converted checkpoint: its folder, its config, and its layers to probe."""

    folder: Path
    config: Any
    layers: list[int]

    @property
    def kind(self) -> str:
        """Return the kind of the probed layers, or "mixed"."""
        kinds = {self.config.mxd["layers"][str(index)]["kind"] for index in self.layers}
        return kinds.pop() if len(kinds) == 1 else "mixed"

    @property
    def units(self) -> str:
        """Return the name of its units: "expert" or "latent"."""
        return KINDS[self.kind].unit if self.kind in KINDS else "expert"


def probe(
    checkpoint: str | Path,
    data: str | Path,
    text_field: str = "text",
    label_field: str = "label",
    output: str | Path | None = None,
    compare: Sequence[str | Path] = (),
    base: str | None = None,
    layers: str | int | list[int] = "all",
    documents: int = DOCUMENTS,
    tokens: int | None = None,
    seed: int = 0,
    device: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Probe a converted checkpoint's experts and the baselines on labelled documents, and write the results to a folder.

    Args:
        checkpoint: Folder of the converted checkpoint.
        data: Labelled text: .jsonl (also .gz), .parquet, a folder or a glob.
        text_field: Field with the text of each document.
        label_field: Field with the class of each document.
        output: Folder to write. None: `<checkpoint>-probe-<data>`, next to the checkpoint.
        compare: Converted checkpoints of the same base model to probe too, such as transcoders.
        base: Base model to use instead of the recorded one.
        layers: Layer indices, as in a recipe: 3, [3, 4], "3,4", "0-2" or "all".
        documents: Maximum number of documents per class.
        tokens: Maximum number of tokens per document. None: 128, or the model's length if that is shorter.
        seed: Random seed of the sample, the split, the random gate and the bootstrap.
        device: Torch device. None uses CUDA if available, else the CPU.
        quiet: Print no progress.

    Returns:
        The content of probe.json (docs/probing.md), and `output`.

    Raises:
        InputError: The checkpoints, labelled text, options or output folder can't be used.
    """
    start = time.monotonic()
    target = probe_folder(output, Path(checkpoint), Path(data))
    ours = _with_experts(Path(checkpoint), layers)
    others = [_comparable(Path(folder), ours) for folder in compare]
    length = _check_sizes(ours.config, documents, tokens, seed)
    name = Path(data).name
    sample = read_labelled(str(Path(data).expanduser()), text_field, label_field, documents, seed)
    vocabulary = ours.config.get_text_config().vocab_size
    encoded, kept = encode_documents(sample.texts, load_tokenizer(str(checkpoint)), length, vocabulary)
    check_classes([sample.labels[number] for number in kept], name, label_field)
    classes = sorted({sample.labels[number] for number in kept})
    labels_D = np.asarray([classes.index(sample.labels[number]) for number in kept])
    torch_device = pick_device(device)
    passes = 2 + len(others)
    line = f"probing: {len(encoded):,} documents of {len(classes)} classes, {encoded.tokens:,} tokens, through {passes} models"
    with memory_guard(_MEMORY), progress(passes * len(encoded), quiet, "pooling", line) as advance:
        families, kinds = _pool_all(ours, others, base, encoded, seed, torch_device, advance)
    pooled = time.monotonic()
    split = probing.split_documents(labels_D, seed)
    line = "choosing units on the training split, scoring on the test split"
    with progress(len(families) + 1, quiet, "probing", line) as advance:
        figures = probe_families(families, kinds, classes, labels_D, split, ours.units, seed, advance)
    content = {
        "checkpoint": {"name": ours.folder.resolve().name, "kind": ours.kind, "base": recorded_base(ours.config)},
        "compare": [{"name": o.folder.resolve().name, "kind": o.kind, "layers": o.layers} for o in others],
        "data": _describe(name, sample, kept, text_field, label_field, encoded, classes, labels_D, split),
        "settings": {
            "layers": ours.layers,
            "documents_a_class": documents,
            "tokens_a_document": length,
            "seed": seed,
            "test_share": probing.TEST_SHARE,
            "folds": probing.FOLDS,
            "candidates_cross_validated": probing.CANDIDATES,
            "bootstrap_resamples": probing.RESAMPLES,
        },
        **figures,
        "cost": {"pooling_seconds": pooled - start, "probing_seconds": time.monotonic() - pooled},
        "versions": versions("scikit-learn", "scipy"),
    }
    with finished_probe(target) as folder:
        write_probe(folder, content)
    return {**content, "output": str(target)}


def _with_experts(folder: Path, layers: str | int | list[int]) -> _Checkpoint:
    config = read_config(folder)
    entries = {int(index): entry for index, entry in config.mxd["layers"].items()}
    able = [index for index, entry in entries.items() if entry.get("n_experts")]
    if not able:
        kinds = ", ".join(sorted({entry["kind"] for entry in entries.values()}))
        raise InputError(
            f"{folder}: its layers are of kind {kinds}, which has no experts to probe. Give a checkpoint with experts."
        )
    try:
        wanted = able if layers == "all" else layer_indices(layers, None)
    except ValueError as error:
        raise InputError(f"--{error}") from None
    for index in wanted:
        check_converted(index, entries, "--layers: ")
        if index not in able:
            raise InputError(f"--layers: layer {index} is a {entries[index]['kind']}, which has no experts to probe")
    return _Checkpoint(folder, config, wanted)


def _comparable(folder: Path, ours: _Checkpoint) -> _Checkpoint:
    """Return a checkpoint to compare with, and the probed layers in which it has experts or latents. Raises InputError."""
    other = _with_experts(folder, "all")
    if recorded_base(other.config).get("sha256") != recorded_base(ours.config).get("sha256"):
        raise InputError(
            f"--compare {folder}: comes from another base model than {ours.folder}. Give a conversion of the same base model."
        )
    layers = [index for index in ours.layers if index in other.layers]
    if not layers:
        raise InputError(
            f"--compare {folder}: has experts in layers {', '.join(map(str, other.layers))}, but the layers probed are"
            f" {', '.join(map(str, ours.layers))}. Give a checkpoint with experts in one of these."
        )
    return _Checkpoint(folder, other.config, layers)


def _check_sizes(config: Any, documents: int, tokens: int | None, seed: int) -> int:
    """Return the maximum number of tokens per document. Raises InputError if a number is out of range."""
    if documents < MIN_DOCUMENTS:
        raise InputError(f"--documents {documents}: a probe needs at least {MIN_DOCUMENTS} per class")
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed {seed}: expected a whole number from 0 to {2**32 - 1}")
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    most = limit if isinstance(limit, int) else None
    if tokens is None:
        return min(TOKENS, most or TOKENS)
    if tokens < 2 or (most is not None and tokens > most):
        raise InputError(f"--tokens {tokens}: expected from 2 to the model's maximum length" + (f", {most}" if most else ""))
    return tokens


def _pool_all(
    ours: _Checkpoint,
    others: list[_Checkpoint],
    base: str | None,
    documents: Documents,
    seed: int,
    device: torch.device,
    advance: Any,
) -> tuple[dict[str, Family], dict[str, str]]:
    """Return the pooled coefficients and the kind of every family.

    The base model is checked against the checkpoint. Checkpoints to compare with are loaded one at a time to save memory.
    """
    converted = load_checkpoint(ours.folder, dtype="float32", finite=True).to(device)
    original = original_of(ours.folder, converted, base)
    sites = find_sites(original, converted.config, ours.layers)
    neurons = {("neuron", site.index): hidden_units(original, site) for site in sites}
    pooled = pool(original.float(), neurons, documents, device, advance)
    del original, neurons
    layers = converted.mxd_layers()
    sources = {(ours.units, index): coefficients_of(layers[index]) for index in ours.layers}
    if all(other.kind not in KINDS or KINDS[other.kind].learns_gate for other in others):
        control = {index: random_coefficients(layers[index], seed * 10_000 + index) for index in ours.layers}
        sources |= {("random gate", index): source for index, source in control.items()}
    pooled = pool(converted, sources, documents, device, advance) | pooled
    del converted, layers, sources
    kinds = {ours.units: ours.kind, "neuron": "neuron", "random gate": "random_gate"}
    for other in others:
        family = _family_of(other, {*kinds, whole_vector_of(ours.units)})
        kinds[family] = other.kind
        model = load_checkpoint(other.folder, dtype="float32", finite=True)
        found = {(family, index): coefficients_of(model.mxd_layers()[index]) for index in other.layers}
        pooled |= pool(model, found, documents, device, advance)
    families: dict[str, dict[int, Matrix]] = {}
    for (family, index), matrix in pooled.items():
        families.setdefault(family, {})[index] = matrix
    order = [ours.units, "neuron", *(family for family in families if family not in (ours.units, "neuron"))]
    return {family: families[family] for family in order}, {family: kinds[family] for family in order}


def _family_of(other: _Checkpoint, taken: set[str]) -> str:
    """Return the family name of a checkpoint to compare with: its kind, and its folder if the kind is ambiguous."""
    folder = other.folder.resolve().name
    name = {"mxd": f"expert of {folder}", "random_gate": "random gate, trained layer", "mixed": folder}.get(
        other.kind, other.kind.replace("_", " ")
    )
    if name in taken:
        name = f"{name} of {folder}"
    while name in taken:
        name += "'"
    return name


def _describe(
    name: str,
    sample: Labelled,
    kept: list[int],
    text_field: str,
    label_field: str,
    documents: Documents,
    classes: list[str],
    labels_D: Array,
    split: probing.Split,
) -> dict[str, Any]:
    def count(label: int, rows: Array) -> int:
        return int((labels_D[rows] == label).sum())

    return {
        "path": name,
        "fingerprint": sample.fingerprint(),
        "text_field": text_field,
        "label_field": label_field,
        "tokens": documents.tokens,
        "classes": {
            label: {"available": sample.available[label], "train": count(number, split.train), "test": count(number, split.test)}
            for number, label in enumerate(classes)
        },
        "left_out": {"empty": sample.empty + len(sample.texts) - len(kept), "in_several_classes": sample.ambiguous},
    }
