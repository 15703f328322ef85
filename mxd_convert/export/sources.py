"""The inputs of an export: selected layers, text, converted model and base model."""

from pathlib import Path
from typing import Any

from mxd_convert.base_model.load import load_tokenizer
from mxd_convert.base_model.swap import check_converted
from mxd_convert.checkpoint.read import check_finite, checkpoint_settings, load_checkpoint, original_of
from mxd_convert.data.blocks import Blocks, check_vocabulary, prepare_eval
from mxd_convert.errors import InputError
from mxd_convert.recipe.kinds import KINDS
from mxd_convert.recipe.schema import layer_indices
from mxd_convert.recipe.texts import EvalText

NO_MEMORY = "out of memory while exporting. Free some memory, or export fewer --layers at a time."
GATE_VALUES = 2**25  # most gate values per batch and layer: the gate is (B, N) before top-k
_TOKENS = 4096  # most tokens per batch


def chosen_layers(checkpoint: Path, config: Any, layers: str | list[int]) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """Return (entries, notes): config.json's entries of the selected layers with experts, and notes on layers left out.

    Args:
        checkpoint: the converted checkpoint, for messages.
        config: its config.
        layers: [3, 4], "3,4", "0-2" or "all".

    Raises:
        InputError: if a layer is not converted, or no selected layer has experts.
    """
    entries: dict[str, dict[str, Any]] = config.mxd["layers"]
    try:
        indices = [int(index) for index in entries] if layers == "all" else sorted(layer_indices(layers, None))
    except ValueError as error:
        raise InputError(f"--{error}") from None
    for index in indices:
        check_converted(index, entries, "--layers: ")
    obstacles = {index: _obstacle(entries[str(index)]["kind"]) for index in indices}
    left_out = {index: obstacle for index, obstacle in obstacles.items() if obstacle}
    if len(left_out) == len(indices):
        raise InputError(f"{checkpoint}: no selected layer can be exported: {', '.join(sorted(set(left_out.values())))}")
    notes = [
        f"layer {', '.join(str(index) for index, found in left_out.items() if found == obstacle)}: left out, because {obstacle}"
        for obstacle in sorted(set(left_out.values()))
    ]
    return {index: entries[str(index)] for index in indices if index not in left_out}, notes


def _obstacle(kind: str) -> str | None:
    """Return why layers of a kind have no transcoder's form; None if they have one or are approximated by one."""
    if not KINDS[kind].has_experts:
        return f"a {kind} has no experts"
    return f"a {kind} has hidden units beside its experts" if KINDS[kind].adds else None


def read_text(
    checkpoint: Path, data: str | Path, tokens: int, text_field: str, vocabulary: int, folder: Path
) -> tuple[Blocks, str]:
    """Return (blocks, mask): the text in the checkpoint's evaluation blocks, and which tokens are ignored.

    Args:
        checkpoint: the converted checkpoint.
        data: a local file, folder or glob.
        tokens: most tokens to read.
        text_field: field of a document with its text.
        vocabulary: vocabulary size of the model.
        folder: folder for the blocks.

    Raises:
        InputError: if the text is unreadable or shorter than one block.
    """
    context, mask = checkpoint_settings(checkpoint)
    if tokens < context:
        raise InputError(f"--tokens {tokens}: fewer than one block of {context} tokens. Set --tokens to {context} or more.")
    source = EvalText(path=str(Path(data).expanduser().absolute()), text=text_field, tokens=tokens)
    blocks = prepare_eval(source, context, load_tokenizer(str(checkpoint)), folder)
    check_vocabulary(blocks.ids, vocabulary)
    return blocks, mask


def load_converted(checkpoint: Path) -> Any:
    """Return the converted model in float32. Raises InputError if one of its tensors is not finite."""
    converted = load_checkpoint(checkpoint, dtype="float32")
    check_finite(checkpoint, converted)
    return converted


def find_base(checkpoint: Path, converted: Any, base: str | None) -> tuple[Any, list[str]]:
    """Return (base, notes): the base model in float32, or None with a note if it is unavailable.

    base: id or path from the user; None uses the recorded one. Raises InputError if `base` is not the checkpoint's base model.
    """
    try:
        original = original_of(checkpoint, converted, base)
    except InputError as error:
        if base is not None:
            raise
        return None, [f"figures that need the base model are missing: {error}"]
    return original.float(), []


def batches(first: int, last: int, context: int, most_rows: int, n_experts: int) -> list[slice]:
    """Return slices of blocks `first` to `last - 1` whose gate values fit in `GATE_VALUES`.

    Args:
        first: first block.
        last: end of the blocks.
        context: tokens per block.
        most_rows: most blocks per batch.
        n_experts: number of experts of the widest layer.
    """
    rows = max(1, min(most_rows, _TOKENS // context, GATE_VALUES // (context * n_experts)))
    return [slice(start, min(start + rows, last)) for start in range(first, last, rows)]


def hookpoint(model: Any, index: int) -> str:
    """Return a layer's module path in the model without its head, as sparsify, delphi and lm-eval name modules."""
    return str(model.config.mxd["mlp"].format(i=index).removeprefix(f"{model.base_model_prefix}."))
