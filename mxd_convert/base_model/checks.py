"""Checks of untrusted models before and after they are loaded, with errors that give the fix."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError

from mxd_convert.errors import InputError, first_line, is_disk_full, is_out_of_memory
from mxd_convert.recipe.schema import MAX_LAYERS
from mxd_convert.recipe.section import is_local

WEIGHTS_HELP = "The file is truncated or damaged. Download it or convert again."


@contextmanager
def load_errors(what: str, name: str, done: str = "loaded") -> Iterator[None]:
    """Raise a one-line InputError for any failure of transformers or the Hub to load `what` from `name`.

    An untrusted folder can raise any exception. All are errors of the folder, except for a full disk and exhausted memory.
    """
    try:
        yield
    except InputError:
        raise
    except SafetensorError as error:
        raise InputError(f"{name}: {what} can't be {done} ({first_line(error)}). {WEIGHTS_HELP}") from None
    except Exception as error:
        if is_disk_full(error) or is_out_of_memory(error):
            raise
        raise InputError(f"{name}: {what} can't be {done}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return the first line of an error's message, and the second too if the first ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    line = (
        f"{type(error).__name__}: {line}"
        if isinstance(error, KeyError | RecursionError | AssertionError | ArithmeticError)
        else line
    )
    return line if len(line) <= 300 else line[:297] + "..."


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' warnings and progress bars, which would mix with ours. Failures still raise."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


ADAPTER = (
    "has adapter_config.json, a PEFT adapter that transformers would silently add to the weights. Merge it into them"
    " (merge_and_unload, then save_pretrained), or move it elsewhere."
)
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_labels")
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


def check_adapters(folder: Path) -> None:
    """Raise InputError if the folder has an adapter, because transformers would add it to the weights without a message."""
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{folder}: {ADAPTER}")


def check_unambiguous(name: str) -> None:
    """Raise InputError if a Hub id is also a path in the working directory, which transformers would load instead."""
    if not is_local(name) and Path(name).exists():
        raise InputError(
            f"{name}: names both a model on the Hub and a path in the working directory. Write ./{name} for the path, or run from"
            " another directory for the model on the Hub."
        )


def check_config(content: Mapping[str, Any], where: str, trusted: bool = False) -> None:
    """Raise InputError if a config.json would run custom code, describes a model that takes hours to build, or is inconsistent.

    where: the start of the message. trusted: whether custom code may run.
    """
    vocabulary, pad = content.get("vocab_size"), content.get("pad_token_id")
    if isinstance(vocabulary, int) and isinstance(pad, int) and pad >= vocabulary > 0:
        raise InputError(
            f"{where}: pad_token_id {pad} exceeds the largest id, {vocabulary - 1} with vocab_size {vocabulary}. Set pad_token_id to"
            " an id of the vocabulary, or to null."
        )
    for key, value in content.items():
        if key in _COUNTS and isinstance(value, int | float) and value > MAX_LAYERS:
            raise InputError(f"{where}: {key} is {value:.6g}, more than the limit of {MAX_LAYERS:,}. Download it again.")
        if key.removesuffix("_internal").strip("_") in _IMPLEMENTATIONS and not trusted:
            values = value.values() if isinstance(value, dict) else [value]
            if not all(found is None or (isinstance(found, str) and found.isidentifier()) for found in values):
                raise InputError(f"{where}: {key} is {value!r:.80}, code from elsewhere. Set it to a name such as sdpa or eager.")
        if isinstance(value, dict):
            check_config(value, f"{where}: {key}", trusted)


@contextmanager
def named_trust(name: str) -> Iterator[None]:
    """Raise an InputError that names our own setting if transformers asks for trust_remote_code."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise InputError(
            f"base.model: {name} has custom code, which is not run by default. Read its .py files, then set"
            " base.trust_remote_code: true (for a converted checkpoint, put --trust-remote-code before the command)."
        ) from None


def check_loaded(model: Any, info: Mapping[str, Any], name: str, config: str = "config.json") -> None:
    """Raise InputError if the weights don't fill a model that transformers has just loaded.

    Args:
        model: the loaded model.
        info: transformers' loading info.
        name: of the model, for the message.
        config: where its sizes come from.
    """
    if mismatched := sorted(info["mismatched_keys"]):
        tensor, theirs, ours = mismatched[0]
        raise InputError(
            f"{name}: the weights don't fit {config}: {tensor} has shape {list(theirs)}, but the sizes in {config} give"
            f" {list(ours)}. Correct {config}, or give the complete model."
        )
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{name}: the weights lack {missing[0]}{more}, which would be random. Give the complete model.")
