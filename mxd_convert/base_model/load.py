"""Loading of the base model's config, tokenizer and weights, with errors that give the fix; and the hash of its tensors."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download, resolve_revision
from huggingface_hub.constants import HF_HUB_OFFLINE
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.utils.peft_utils import find_adapter_config_file

from mxd_convert.base_model.detect import guess
from mxd_convert.base_model.families import architecture_of, is_mixture
from mxd_convert.base_model.remote_code import is_trusted
from mxd_convert.errors import InputError, first_line, is_disk_full, is_out_of_memory
from mxd_convert.files import check_pointer, read_mapping
from mxd_convert.recipe.load import parse_yaml
from mxd_convert.recipe.schema import MAX_LAYERS, Base, Mlp, is_local

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


def load_config(base: Base) -> Any:
    """Return the base model's config. Raises InputError if the model has none or can't be converted."""
    check_unambiguous(base.model)
    if is_local(base.model):
        folder = Path(base.model)
        if not folder.is_dir():
            raise InputError(f"base.model: {base.model}: no such folder. Give a model's folder or its Hub id.")
        check_adapters(folder)
        if not (folder / "config.json").is_file():
            raise InputError(
                f"base.model: {base.model}: the folder has no config.json, so it is not a model. Give a model's folder or its Hub id."
            )
        read_mapping(folder / "config.json", "Download the model again.")
        for file in folder.glob("*.safetensors"):
            check_pointer(file)
    with load_errors("its config", base.model), quiet():
        content, _ = PreTrainedConfig.get_config_dict(base.model, revision=base.revision)
        if str(content.get("model_type")).startswith("mxd_"):
            raise InputError(f"base.model: {base.model} is already converted. Give its base model.")
        check_config(content, f"base.model: {base.model}: config.json", _trusted(base))
        if not is_local(base.model) and find_adapter_config_file(
            base.model, revision=base.revision, local_files_only=HF_HUB_OFFLINE
        ):
            raise InputError(f"base.model: {base.model}: {_ADAPTER}")
        with _named_trust(base.model):
            config = AutoConfig.from_pretrained(base.model, revision=base.revision, trust_remote_code=_trusted(base))
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"base.model: {base.model} is quantised. Give the unquantised model, whose activations are exact.")
    return config


_ADAPTER = (
    "has adapter_config.json, a PEFT adapter that transformers would silently add to the weights. Merge it into them"
    " (merge_and_unload, then save_pretrained), or move it elsewhere."
)
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_labels")
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


def check_adapters(folder: Path) -> None:
    """Raise InputError if the folder has an adapter, because transformers would add it to the weights without a message."""
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{folder}: {_ADAPTER}")


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
def _named_trust(name: str) -> Iterator[None]:
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


def _trusted(base: Base) -> bool:
    return base.trust_remote_code or is_trusted()


def pinned(base: Base) -> Base:
    """Return `base` with its revision resolved to a commit, so that every later load and the report use the same weights."""
    if is_local(base.model):
        return base
    try:
        revision = resolve_revision(base.model, revision=base.revision, local_files_only=HF_HUB_OFFLINE)
    except Exception:  # loading the model raises a clearer error later
        return base
    return base.model_copy(update={"revision": revision.resolved})


_CARD_FIELDS = ("license", "license_name", "license_link", "language")


def card_of(base: Base) -> dict[str, Any]:
    """Return licence and language from the base's model card, or {} if the card is missing, invalid or not reachable."""
    try:
        if is_local(base.model):
            path = Path(base.model) / "README.md"
        else:
            path = Path(hf_hub_download(base.model, "README.md", revision=base.revision, local_files_only=HF_HUB_OFFLINE))
        head = re.match(r"\s*---\n(.*?)\n---", path.read_text(encoding="utf-8-sig").replace("\r\n", "\n"), re.DOTALL)
        data = parse_yaml(head[1]) if head is not None else {}  # YAML 1.2, because 1.1 reads `no` (Norwegian) as false
        return {key: data[key] for key in _CARD_FIELDS if _is_valid_field(data.get(key), lists=key == "language")}
    except Exception:  # an invalid card of the base must not stop a run
        return {}


def _is_valid_field(value: Any, lists: bool) -> bool:
    if lists and isinstance(value, list):
        return bool(value) and all(_is_valid_field(item, lists=False) for item in value)
    return isinstance(value, str) and 0 < len(value) <= 1000


_TOKENIZER = ("tokenizer", "tokenization", "vocab", "merges", "tekken")


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a model or checkpoint. Raises InputError if it is missing, broken, or needs untrusted code."""
    trusted = trust_remote_code or is_trusted()
    folder = Path(name)
    if folder.is_dir() and not any(file.name.startswith(_TOKENIZER) or file.suffix == ".model" for file in folder.iterdir()):
        raise InputError(f"{name}: has no tokenizer (tokenizer.json, or its family's files). Save the tokenizer there.")
    with load_errors("its tokenizer", name), quiet(), _named_trust(name):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trusted)
        tokenizer("a", add_special_tokens=True)["input_ids"]  # some broken tokenizers fail only when used
        return tokenizer


@dataclass(frozen=True)
class Spread:
    """Limits for a model spread over several devices.

    room: bytes that the model may use per device (GPU index or "cpu"). folder: for the weights that exceed these limits.
    """

    room: dict[int | str, int]
    folder: Path


def load_base(base: Base, dtype: str | None = None, spread: Spread | None = None) -> Any:
    """Return the base model in evaluation mode, without gradients, on the CPU unless `spread` is given.

    Args:
        base: The recipe's `base`.
        dtype: The name of a dtype, as in the recipe, or None for `base.dtype`.
        spread: For a model too large for one device: accelerate distributes it, and it must not be moved afterwards.

    Raises:
        InputError: If the model can't be loaded, or its weights don't match its config.
    """
    check_unambiguous(base.model)
    placed = {} if spread is None else {"device_map": "auto", "max_memory": spread.room, "offload_folder": str(spread.folder)}
    with load_errors("the model", base.model), quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base.model,
            revision=base.revision,
            trust_remote_code=_trusted(base),
            dtype=dtype or base.dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with the tensor's name
            use_safetensors=True,
            **placed,
        )
    model, info = loaded
    if mismatched := sorted(info["mismatched_keys"]):
        name, theirs, ours = mismatched[0]
        raise InputError(
            f"{base.model}: the weights don't fit config.json: {name} has shape {list(theirs)}, but the sizes in config.json give"
            f" {list(ours)}. Correct config.json, or give the complete model."
        )
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{base.model}: the weights lack {missing[0]}{more}, which would be random. Give the complete model.")
    layers = model.config.num_hidden_layers
    beyond = architecture_of(model.config, base.mlp).layer.format(i=layers).removeprefix(f"{model.base_model_prefix}.")
    if any(f"{beyond}." in key for key in info["unexpected_keys"]):
        raise InputError(f"{base.model}: its config.json says {layers} layers, but the weights have more. Correct config.json.")
    return model.eval().requires_grad_(False)


def pick_device(name: str | None) -> torch.device:
    """Return the device of that name; without a name a CUDA device if there is one, else the CPU."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def empty_model(config: Any) -> Any:
    """Return the model of a config without weights, on the meta device."""
    with torch.device("meta"), quiet():
        return AutoModelForCausalLM.from_config(config, trust_remote_code=is_trusted())


def likely_mlp(config: Any) -> Mlp | None:
    """Return the likely MLP of an unsupported family, or None if none is found or the config is of no model that can be built."""
    if is_mixture(config):
        return None
    try:
        return guess(empty_model(config), config)
    except Exception:  # building may fail in any way; then there is no suggestion
        return None


def tensors_sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 over tensors sorted by name: name, dtype, shape and bytes. It doesn't depend on the split into files."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(json.dumps([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def model_sha256(model: Any) -> str:
    """Return the hash of a loaded model's tensors. Tied tensors count once."""
    return tensors_sha256(untied_tensors(model).items())


def untied_tensors(model: Any) -> dict[str, Tensor]:
    """Return the state dict as stored in a checkpoint, with only one of each group of tied tensors."""
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
