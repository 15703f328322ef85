"""`dashboard`: a folder of HTML pages about every expert, which open from disk without a network."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

import mxd_convert
from mxd_convert import files
from mxd_convert.base_model.load import load_tokenizer, pick_device
from mxd_convert.checkpoint.labels import Label, read_labels
from mxd_convert.checkpoint.read import checkpoint_settings, load_checkpoint, recorded_base
from mxd_convert.dashboard.pages import RARE, SHARD, TEXT_SHARD, LayerPages, Source, about_layer, write_data, write_text
from mxd_convert.dashboard.tokens import Tokens
from mxd_convert.data.blocks import Blocks, check_vocabulary, prepare_eval
from mxd_convert.errors import InputError
from mxd_convert.evaluation.experts.decomposition import Unembedding
from mxd_convert.evaluation.experts.examples import AFTER, BEFORE
from mxd_convert.evaluation.experts.statistics import SAMPLES, chosen_layers, collect
from mxd_convert.evaluation.layer_figures import ALWAYS_ON
from mxd_convert.files import move_into_place, temporary_sibling
from mxd_convert.recipe.schema import MASKED, layer_indices
from mxd_convert.recipe.texts import EvalText

STATIC = Path(__file__).parent.parent / "dashboard" / "static"
_MARK = '<meta name="generator" content="mxd-convert dashboard">'
_OURS = {"index.html", "expert.html", "assets", "data"}


def make_dashboard(
    checkpoint: str | Path,
    data: str | Path,
    output: str | Path,
    tokens: int = 262_144,
    text_field: str = "text",
    layers: list[int] | str = "all",
    device: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write the dashboard of a checkpoint's experts on a text.

    Args:
        checkpoint: Folder of the converted checkpoint.
        data: Text held out from training: a local file, folder or glob.
        output: Folder to write: new, empty, or a dashboard, which is replaced.
        tokens: Maximum number of tokens to read.
        text_field: Field with the text of each document.
        layers: Layer indices: [3, 4], "3,4", "0-2" or "all".
        device: Torch device. None uses CUDA if available, else the CPU.
        quiet: Print no progress.

    Returns:
        A dict with `output`, `data`, and `layers`, which has `experts`, `dead`, `rare` and `always_on` counts by layer index.

    Raises:
        InputError: The checkpoint, text, layers or output folder can't be used.
    """
    output = Path(output).expanduser()
    check_output(output)
    context, mask = checkpoint_settings(Path(checkpoint))
    if tokens < context:
        raise InputError(f"--tokens {tokens}: fewer than one block of {context} tokens. Set --tokens to {context} or more.")
    try:
        indices = None if layers == "all" else layer_indices(layers, None)
    except ValueError as error:
        raise InputError(f"--{error}") from None
    labels = read_labels(checkpoint)
    model, tokenizer = load_checkpoint(checkpoint, dtype="float32", finite=True), load_tokenizer(str(checkpoint))
    chosen_layers(model, indices)
    torch_device = pick_device(device)
    with tempfile.TemporaryDirectory() as folder:
        source = EvalText(path=str(Path(data).expanduser().absolute()), text=text_field, tokens=tokens)
        blocks = prepare_eval(source, context, tokenizer, Path(folder))
        name = Path(checkpoint).resolve().name
        return write_dashboard(output, model, tokenizer, blocks, name, labels, indices, mask, torch_device, quiet)


def write_dashboard(
    output: Path,
    model: Any,
    tokenizer: Any,
    blocks: Blocks,
    name: str,
    labels: list[Label] | None = None,
    layers: list[int] | None = None,
    mask: str = "bos",
    device: torch.device | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write the dashboard of a loaded converted model on a tokenised text.

    Args:
        output: Folder to write: new, empty, or a dashboard, which is replaced.
        model: Converted model.
        tokenizer: Tokenizer of the model.
        blocks: Tokenised text.
        name: Name of the checkpoint shown on the pages.
        labels: Labels of experts.
        layers: Layer indices. None takes all layers that have experts.
        mask: Which tokens are left out: the recipe's `train.mask`.
        device: Torch device to run on. None takes the CPU.
        quiet: Print no progress.

    Returns:
        The same dict as `make_dashboard`.
    """
    check_output(output)
    check_vocabulary(blocks.ids, model.config.get_text_config().vocab_size)
    with temporary_sibling(output) as scratch:
        folder = scratch / "dashboard"
        shutil.copytree(STATIC, folder, copy_function=shutil.copyfile)
        records = collect(model, blocks, scratch / "records", layers, mask, device, quiet)
        unembedding = Unembedding.of(model)
        text = Tokens(tokenizer, len(unembedding.matrix_VO))
        source = Source(blocks, text, unembedding, min(len(tokenizer), len(unembedding.matrix_VO)))
        write_text(folder, blocks, text)
        about = []
        for index in list(records):
            pages = LayerPages(index, records.pop(index), source)
            pages.write(folder)
            about.append(pages.about())
        write_data(folder, "data/tokens", {"ids": text.ids, "texts": text.texts})
        summary = _summary(model, blocks, name, labels or [], about, mask)
        write_data(folder, "data/summary", summary)
        move_into_place(folder, output, scratch)
    figures = {
        str(layer["layer"]): {"experts": layer["n_experts"], **{key: layer[key] for key in ("dead", "rare", "always_on")}}
        for layer in about
    }
    return {"output": str(output), "data": summary["data"], "layers": figures}


def _summary(
    model: Any, blocks: Blocks, name: str, labels: list[Label], about: list[dict[str, Any]], mask: str
) -> dict[str, Any]:
    layers = model.mxd_layers()
    return {
        "checkpoint": name,
        "base": recorded_base(model.config).get("model"),
        "version": mxd_convert.__version__,
        "data": {
            "path": blocks.info.path,
            "fingerprint": blocks.info.fingerprint,
            "tokens": about[0]["tokens"],
            "blocks": len(blocks),
            "context": blocks.context,
            "masked": None if mask == "none" else MASKED[mask],
        },
        "layers": about,
        "without": [about_layer(index, layer) for index, layer in layers.items() if layer.n_experts == 0],
        "labels": [label.model_dump() for label in labels],
        "window": [BEFORE, AFTER],
        "rates": {"rare": RARE, "always": ALWAYS_ON},
        "samples": SAMPLES,
        "shard": SHARD,
        "text_shard": TEXT_SHARD,
    }


def check_output(output: Path) -> None:
    """Raise InputError if `output` exists and is neither an empty folder nor a dashboard."""
    if output.exists() and not _is_replaceable(output):
        raise InputError(f"--output {output}: exists already and is not a dashboard. Choose another folder.")
    files.check_output(output)


def _is_replaceable(output: Path) -> bool:
    """Return whether `output` is an empty folder or contains a dashboard only."""
    if not output.is_dir():
        return False
    names, index = {path.name for path in output.iterdir()}, output / "index.html"
    return not names or (names <= _OURS and index.is_file() and _MARK in index.read_text(encoding="utf-8", errors="replace"))
