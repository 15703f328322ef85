"""What an export reads: the layers asked for, the text, the base model."""

from pathlib import Path
from typing import Any

from mxd_convert.base_model.load import load_tokenizer
from mxd_convert.checkpoint.read import check_finite, checkpoint_settings, load_checkpoint, original_of
from mxd_convert.data.blocks import Blocks, check_vocabulary, prepare_eval
from mxd_convert.errors import InputError
from mxd_convert.recipe.schema import EvalText, layer_indices

NO_MEMORY = "out of memory while exporting; free some, or export fewer --layers at a time"
GATE_VALUES = 2**25  # of one batch and layer: a gate is (B, N) before the top-k
_TOKENS = 4096  # of one batch


def chosen_layers(checkpoint: Path, config: Any, layers: str | list[int]) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """(config.json's entries of the layers that are asked for and have experts, what to say of the others). Raises InputError."""
    entries: dict[str, dict[str, Any]] = config.mxd["layers"]
    try:
        indices = [int(index) for index in entries] if layers == "all" else sorted(layer_indices(layers, None))
    except ValueError as error:
        raise InputError(f"--{error}") from None
    for index in indices:
        if str(index) not in entries:
            raise InputError(f"--layers: layer {index} is not converted; converted are {', '.join(entries)}")
    dense = [index for index in indices if not entries[str(index)].get("n_experts")]
    if dense == indices:
        raise InputError(f"{checkpoint}: every layer asked for is a dense_twin, which has no experts to export")
    notes = [f"left out, as a dense_twin has no experts: layer {', '.join(map(str, dense))}"] if dense else []
    return {index: entries[str(index)] for index in indices if index not in dense}, notes


def read_text(
    checkpoint: Path, data: str | Path, tokens: int, text_field: str, vocabulary: int, folder: Path
) -> tuple[Blocks, bool]:
    """(the text in blocks as the checkpoint is evaluated in, whether BOS and first positions are left out). Raises InputError."""
    context, mask_bos = checkpoint_settings(checkpoint)
    if tokens < context:
        raise InputError(f"--tokens {tokens}: fewer than one block of {context}; give more")
    source = EvalText(path=str(Path(data).expanduser().absolute()), text=text_field, tokens=tokens)
    blocks = prepare_eval(source, context, load_tokenizer(str(checkpoint)), folder)
    check_vocabulary(blocks, vocabulary)
    return blocks, mask_bos


def load_converted(checkpoint: Path) -> Any:
    """The converted model in float32. Raises InputError where a tensor of it is not finite, as nothing measured on it would be."""
    converted = load_checkpoint(checkpoint, dtype="float32")
    check_finite(checkpoint, converted)
    return converted


def find_base(checkpoint: Path, converted: Any, base: str | None) -> tuple[Any, list[str]]:
    """(the base model or None, what to say of it). Raises InputError where the one that was given is not the checkpoint's."""
    try:
        original = original_of(checkpoint, converted, base)
    except InputError as error:
        if base is not None:
            raise
        return None, [f"without the figures that need the base model; {error}"]
    return original.float(), []


def batches(first: int, last: int, context: int, most_rows: int, n_experts: int) -> list[slice]:
    """Blocks `first` to `last` - 1 in batches whose gates, of `n_experts` experts a token, fit in a modest memory."""
    rows = max(1, min(most_rows, _TOKENS // context, GATE_VALUES // (context * n_experts)))
    return [slice(start, min(start + rows, last)) for start in range(first, last, rows)]


def hookpoint(model: Any, index: int) -> str:
    """The path of a layer as seen from the model without its head, by which sparsify, delphi and lm-eval name modules."""
    return str(model.config.mxd["mlp"].format(i=index).removeprefix(f"{model.base_model_prefix}."))
