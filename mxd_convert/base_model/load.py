"""Loading of the base model's config, tokenizer and weights, with errors that give the fix; and the hash of its tensors."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, resolve_revision
from huggingface_hub.constants import HF_HUB_OFFLINE
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from mxd_convert.base_model.checks import (
    ADAPTER,
    check_adapters,
    check_config,
    check_loaded,
    check_unambiguous,
    load_errors,
    named_trust,
    quiet,
)
from mxd_convert.base_model.detect import guess
from mxd_convert.base_model.families import architecture_of, is_mixture
from mxd_convert.base_model.gguf import from_gguf
from mxd_convert.base_model.quantised import dequantised, unquantised
from mxd_convert.base_model.remote_code import is_trusted
from mxd_convert.errors import InputError, first_line
from mxd_convert.escaping import printable
from mxd_convert.files import check_pointer, read_mapping
from mxd_convert.recipe.load import parse_yaml
from mxd_convert.recipe.schema import GGUF, Base, Mlp
from mxd_convert.recipe.section import is_local


def load_config(base: Base) -> Any:
    """Return the base model's config, of its dequantised form if it is quantised.

    Raises InputError if the model has no config or can't be converted.
    """
    check_unambiguous(base.model)
    base = from_gguf(base)
    if is_local(base.model):
        folder = Path(base.model)
        if not folder.is_dir():
            raise InputError(f"base.model: {base.model}: no such folder. Give a model's folder or its Hub id.")
        check_adapters(folder)
        if not (folder / "config.json").is_file():
            found = sorted(file.name for file in folder.glob(f"*{GGUF}"))
            fix = f"Set base.gguf_file to {' or '.join(found[:3])}." if found else "Give a model's folder or its Hub id."
            raise InputError(f"base.model: {base.model}: the folder has no config.json, so it is not a model. {fix}")
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
            raise InputError(f"base.model: {base.model}: {ADAPTER}")
        with named_trust(base.model):
            config = AutoConfig.from_pretrained(base.model, revision=base.revision, trust_remote_code=_trusted(base))
    return unquantised(config, base.model)


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
        base = from_gguf(base) if base.is_local else base  # a GGUF file's own metadata; on the Hub, the repository's card
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


def base_tokenizer(base: Base) -> Any:
    """Return the base model's tokenizer. Raises InputError as `load_tokenizer` does."""
    base = from_gguf(base)
    return load_tokenizer(base.model, base.revision, base.trust_remote_code)


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a model or checkpoint. Raises InputError if it is missing, broken, or needs untrusted code."""
    trusted = trust_remote_code or is_trusted()
    folder = Path(name)
    if folder.is_dir() and not any(file.name.startswith(_TOKENIZER) or file.suffix == ".model" for file in folder.iterdir()):
        raise InputError(f"{name}: has no tokenizer (tokenizer.json, or its family's files). Save the tokenizer there.")
    with load_errors("its tokenizer", name), quiet(), named_trust(name):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trusted)
        tokenizer("a", add_special_tokens=True)["input_ids"]  # some broken tokenizers fail only when used
        return tokenizer


_PROCESSOR = (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME)


def copy_processor(name: str, folder: Path, revision: str | None = None) -> None:
    """Copy the settings of the processor of images, if a model or checkpoint has any, into `folder`."""
    for file in _PROCESSOR:
        with load_errors(file, name):
            found = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            shutil.copyfile(found, folder / file)


@dataclass(frozen=True)
class Spread:
    """Limits for a model spread over several devices.

    room: bytes that the model may use per device (GPU index or "cpu"). folder: for the weights that exceed these limits.
    """

    room: dict[int | str, int]
    folder: Path


def load_base(base: Base, dtype: str | None = None, spread: Spread | None = None) -> Any:
    """Return the base model in evaluation mode, without gradients, on the CPU unless `spread` is given.

    Quantised weights are dequantised.

    Args:
        base: The recipe's `base`.
        dtype: The name of a dtype, as in the recipe, or None for `base.dtype`.
        spread: For a model too large for one device: accelerate distributes it, and it must not be moved afterwards.

    Raises:
        InputError: If the model can't be loaded, or its weights don't match its config.
    """
    check_unambiguous(base.model)
    base = from_gguf(base)
    placed = {} if spread is None else {"device_map": "auto", "max_memory": spread.room, "offload_folder": str(spread.folder)}
    with load_errors("the model", base.model), quiet():
        content, _ = PreTrainedConfig.get_config_dict(base.model, revision=base.revision)
        loaded: Any = auto_class(content.get("model_type")).from_pretrained(
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
    check_loaded(model, info, base.model)
    layers = model.config.get_text_config().num_hidden_layers
    beyond = architecture_of(model.config, base.mlp).layer.format(i=layers).removeprefix(f"{model.base_model_prefix}.")
    if any(f"{beyond}." in key for key in info["unexpected_keys"]):
        raise InputError(f"{base.model}: its config.json says {layers} layers, but the weights have more. Correct config.json.")
    config = unquantised(model.config, base.model)
    if config is not model.config:
        with quiet():
            model = dequantised(model, base.model)
        vars(model).pop("_weight_conversions", None)  # by which the quantised tensors would be stored again
        _check_dequantised(model, empty_model(config), base.model)
    return model.eval().requires_grad_(False)


def _check_dequantised(model: Any, empty: Any, name: str) -> None:
    """Raise InputError if a dequantised model has other modules than the model that was quantised (`empty`)."""
    for path, module in empty.named_modules():
        found = model.get_submodule(path)
        if type(found) is not type(module):
            raise InputError(
                f"base.model: {name} is quantised, and transformers can't dequantise it: {path} becomes a {type(found).__name__}, not a"
                f" {type(module).__name__}. Give the unquantised model."
            )


def pick_device(name: str | None) -> torch.device:
    """Return the device of that name; without a name a CUDA device if there is one, else the CPU.

    Raises InputError if this machine or torch has no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"--device {printable(name)[:40]}: can't be used ({first_line(error, 80)}). Try cpu or cuda.") from None
    return device


def empty_model(config: Any) -> Any:
    """Return the model of a config without weights, on the meta device."""
    with torch.device("meta"), quiet():
        return auto_class(config.model_type).from_config(config, trust_remote_code=is_trusted())


def auto_class(model_type: Any) -> Any:
    """Return the auto class that loads a model type as a causal LM: for some types the class of models with images."""
    only_images = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForImageTextToText if only_images else AutoModelForCausalLM


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
    """Return the state dict with only one of each group of tied tensors."""
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def stored_tensors(model: Any) -> dict[str, Tensor]:
    """Return the tensors as `save_pretrained` stores them: for some families under other names than in the model."""
    return revert_weight_conversion(model, untied_tensors(model))
