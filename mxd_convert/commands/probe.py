"""`probe`: how well single experts tell the classes of labelled documents apart, beside neurons, latents, a random gate and all experts."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mxd_convert.base_model.families import find_sites
from mxd_convert.base_model.load import load_tokenizer
from mxd_convert.checkpoint.read import load_checkpoint, original_of, read_config, recorded_base
from mxd_convert.data.labelled import FEWEST_DOCUMENTS, Labelled, check_classes, read_labelled
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

DOCUMENTS = 500  # a class
TOKENS = 128  # of a document: the context that recipes train with, unless they say otherwise
_MEMORY = "out of memory: lower --documents, or probe fewer layers at a time with --layers"


@dataclass(frozen=True)
class _Checkpoint:
    """A folder, the config in it, and the layers of it that are probed."""

    folder: Path
    config: Any
    layers: list[int]

    @property
    def kind(self) -> str:
        kinds = {self.config.mxd["layers"][str(index)]["kind"] for index in self.layers}
        return kinds.pop() if len(kinds) == 1 else "mixed"

    @property
    def units(self) -> str:
        """What one unit of it is called."""
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
    """Probes of a converted checkpoint's experts over labelled documents, and of what they are compared with; written to a folder.

    data: .jsonl (also .gz) or .parquet with a text and a label. output: None: `<checkpoint>-probe-<data>`, beside the checkpoint.
    compare: converted checkpoints of the same base (transcoders, a random gate) whose units are probed too. layers: as in a recipe.
    documents: a class, at most. tokens: of a document, at most; None: 128, or what the model reads.
    Returns the content of probe.json (docs/probing.md) and "output". Raises InputError.
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
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    passes = 2 + len(others)
    line = f"probing: {len(encoded):,} documents of {len(classes)} classes, {encoded.tokens:,} tokens, through {passes} models"
    with memory_guard(_MEMORY), progress(passes * len(encoded), quiet, "pooling", line) as advance:
        families, kinds = _pool_all(ours, others, base, encoded, seed, place, advance)
    pooled = time.monotonic()
    split = probing.split_documents(labels_D, seed)
    line = "choosing units on the training part, scoring on the test part"
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
        raise InputError(f"{folder}: its layers are of kind {kinds}, which has no experts to probe; give a checkpoint that has")
    try:
        wanted = able if layers == "all" else layer_indices(layers, None)
    except ValueError as error:
        raise InputError(f"--{error}") from None
    for index in wanted:
        if index not in entries:
            raise InputError(f"--layers: layer {index} is not converted; converted are {', '.join(map(str, entries))}")
        if index not in able:
            raise InputError(f"--layers: layer {index} is a {entries[index]['kind']}, which has no experts to probe")
    return _Checkpoint(folder, config, wanted)


def _comparable(folder: Path, ours: _Checkpoint) -> _Checkpoint:
    """A checkpoint to compare with, of the same base, and those of the probed layers in which it has experts or latents."""
    other = _with_experts(folder, "all")
    if recorded_base(other.config).get("sha256") != recorded_base(ours.config).get("sha256"):
        raise InputError(f"--compare {folder}: comes from another base model than {ours.folder}; give one of the same base")
    layers = [index for index in ours.layers if index in other.layers]
    if not layers:
        raise InputError(
            f"--compare {folder}: has experts in layers {', '.join(map(str, other.layers))},"
            f" and probed are {', '.join(map(str, ours.layers))}; give one with a layer of these"
        )
    return _Checkpoint(folder, other.config, layers)


def _check_sizes(config: Any, documents: int, tokens: int | None, seed: int) -> int:
    """How many tokens of a document are read. Raises InputError where a number makes no sense."""
    if documents < FEWEST_DOCUMENTS:
        raise InputError(f"--documents {documents}: a probe needs at least {FEWEST_DOCUMENTS} a class")
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed {seed}: give a whole number from 0 to {2**32 - 1}")
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    most = limit if isinstance(limit, int) else None
    if tokens is None:
        return min(TOKENS, most or TOKENS)
    if tokens < 2 or (most is not None and tokens > most):
        raise InputError(f"--tokens {tokens}: give from 2 to what the model reads at once" + (f", {most}" if most else ""))
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
    """Every family's pooled coefficients, and its kind. The base is checked against the checkpoint; the others come one at a time."""
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
    """What the units of a checkpoint to compare with are called: its kind, and its name where that is not enough."""
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
