"""The pretrained model: its config, tokenizer and weights, loaded with errors that say what to do; and the hash that names it."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, hf_hub_download, resolve_revision
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mxd_convert.architectures import architecture_of, guess, is_mixture
from mxd_convert.errors import InputError, is_disk_full
from mxd_convert.own_code import is_trusted
from mxd_convert.recipe import Base, Mlp, is_local

WEIGHTS_HELP = "the file is truncated or damaged: download it or convert again"


@contextmanager
def explained(what: str, name: str) -> Iterator[None]:
    """Turns the many ways in which transformers and the Hub fail to load something into one line."""
    try:
        yield
    except InputError:
        raise
    except SafetensorError as error:
        raise InputError(f"{name}: {what} can't be loaded, {WEIGHTS_HELP} ({_first_line(error)})") from None
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        ImportError,
        StrictDataclassError,
    ) as error:
        if is_disk_full(error):
            raise
        raise InputError(f"{name}: {what} can't be loaded: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    line = next(line.strip() for line in text.splitlines() if line.strip())
    return line if len(line) <= 300 else line[:297] + "..."


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' own warnings and progress bars, which compete with ours; failures still raise."""
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
    """The base model's config. Raises InputError where there is none or its kind is refused."""
    if is_local(base.model):
        folder = Path(base.model)
        if not folder.is_dir():
            raise InputError(f"base.model: {base.model}: no such folder")
        if not (folder / "config.json").is_file():
            raise InputError(f"base.model: {base.model}: the folder holds no config.json, so it is not a model")
        with explained("its config", base.model):
            content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if str(content.get("model_type")).startswith("mxd_"):
                raise InputError(f"base.model: {base.model} is already converted; give the model that it came from")
    with explained("its config", base.model), quiet():
        try:
            config = AutoConfig.from_pretrained(base.model, revision=base.revision, trust_remote_code=_trusted(base))
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise InputError(
                f"base.model: {base.model} comes with code of its own, which is not run unless you say so: read its .py files, and set"
                " base.trust_remote_code: true"
            ) from None
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"base.model: {base.model} is quantised; give the unquantised model, whose activations are exact")
    return config


def _trusted(base: Base) -> bool:
    return base.trust_remote_code or is_trusted()


def pinned(base: Base) -> Base:
    """The base with its revision resolved to a commit, so that every later load and the report mean the same weights."""
    if is_local(base.model):
        return base
    try:
        revision = resolve_revision(base.model, revision=base.revision, local_files_only=HF_HUB_OFFLINE)
    except Exception:  # whatever is wrong, loading the model says it better
        return base
    return base.model_copy(update={"revision": revision.resolved})


_OF_THE_CARD = ("license", "license_name", "license_link", "language")


def card_of(base: Base) -> dict[str, Any]:
    """What the base's own card says of its licence and language; empty where there is no card, or the Hub can't be reached."""
    try:
        if is_local(base.model):
            path = Path(base.model) / "README.md"
        else:
            path = Path(hf_hub_download(base.model, "README.md", revision=base.revision, local_files_only=HF_HUB_OFFLINE))
        card: Any = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        data = card.data.to_dict()
    except Exception:  # a card is the base's owner's; whatever is wrong with it is no reason to stop
        return {}
    return {key: data[key] for key in _OF_THE_CARD if data.get(key)}


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer that comes with a model or checkpoint. Raises InputError."""
    trusted = trust_remote_code or is_trusted()
    with explained("its tokenizer", name), quiet():
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trusted)


@dataclass(frozen=True)
class Spread:
    """room: bytes of each device (0, 1, ... of the GPUs, "cpu") that a model may take; what is left goes to files in `folder`."""

    room: dict[int | str, int]
    folder: Path


def load_base(base: Base, dtype: str | None = None, spread: Spread | None = None) -> Any:
    """The base model in evaluation mode, on the CPU. dtype: a name as in the recipe; None: the recipe's `base.dtype`. Raises InputError.

    spread: for a model too large for one device, which accelerate then distributes; it runs as it is, without being moved.
    """
    placed = {} if spread is None else {"device_map": "auto", "max_memory": spread.room, "offload_folder": str(spread.folder)}
    with explained("the model", base.model), quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base.model,
            revision=base.revision,
            trust_remote_code=_trusted(base),
            dtype=dtype or base.dtype,
            output_loading_info=True,
            **placed,
        )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{base.model}: the weights lack {missing[0]}{more}; they would be random. Is this the whole model?")
    layers = model.config.num_hidden_layers
    beyond = architecture_of(model.config, base.mlp).layer.format(i=layers).removeprefix(f"{model.base_model_prefix}.")
    if any(f"{beyond}." in key for key in info["unexpected_keys"]):
        raise InputError(f"{base.model}: its config.json says {layers} layers and the weights hold more; mend the config")
    return model.eval().requires_grad_(False)


def empty_model(config: Any) -> Any:
    """The model of a config without weights (on the meta device)."""
    with torch.device("meta"), quiet():
        return AutoModelForCausalLM.from_config(config, trust_remote_code=is_trusted())


def likely_mlp(config: Any) -> Mlp | None:
    """What looks like the MLP of a family without a row; None where nothing does, or the model can't be built from its config."""
    if is_mixture(config):
        return None
    try:
        return guess(empty_model(config), config)
    except Exception:  # whatever can't be built can't be described
        return None


def tensors_sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over tensors by name: name, dtype, shape and bytes. The same however they are spread over files."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(json.dumps([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def model_sha256(model: Any) -> str:
    """The hash of a loaded model's tensors, tied ones once."""
    return tensors_sha256(untied_tensors(model).items())


def untied_tensors(model: Any) -> dict[str, Tensor]:
    """The state dict as a checkpoint holds it: of tied tensors, only the one that others are tied to."""
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
