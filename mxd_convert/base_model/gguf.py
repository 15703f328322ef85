"""Base models in GGUF files. Each file is dequantised once, into a folder of the cache in transformers' own format."""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
import yaml
from huggingface_hub import cached_assets_path, hf_hub_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedConfig
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
from transformers.integrations.gguf.reader import GgufHeader, read_gguf_metadata
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from mxd_convert.base_model.checks import check_config, check_loaded, load_errors, quiet
from mxd_convert.errors import InputError, first_line
from mxd_convert.escaping import say
from mxd_convert.files import check_pointer, file_sha256, locked, move_into_place, temporary_sibling, write_text
from mxd_convert.recipe.schema import Base

FORMAT = "1"  # of the folders in the cache; part of their path
_CARD = {"general.license": "license", "general.license.name": "license_name", "general.license.link": "license_link"}
_STEPS = ("config", "tokenizer", "weights", "files")
_hashes: dict[tuple[Path, int, int], str] = {}  # of files that this process has read, by path, size and time of change


def from_gguf(base: Base, silent: bool = False) -> Base:
    """Return the model of a GGUF file in transformers' own format, and any other base unchanged.

    The first call for a file dequantises it into the cache, and shows its progress on stderr unless `silent`. Matrices keep their
    dtype if none is quantised, and become bfloat16 otherwise.

    Raises InputError if the file is missing, damaged, one part of several, or of an architecture that transformers can't read.
    """
    if base.gguf_file is None:
        return base
    file = _file_of(base)
    metadata = _metadata(file)
    cache = cached_assets_path("mxd-convert", namespace="gguf", subfolder=FORMAT)
    folder = cache / f"{file.stem[:60]}-{_sha256(file)[:16]}"
    if not folder.is_dir():
        with locked(cache), temporary_sibling(folder) as scratch, _progress(file.name, silent) as step:
            if not folder.is_dir():  # another process may have written it in the meantime
                _dequantise(file, metadata, scratch / "new", step)
                move_into_place(scratch / "new", folder, scratch)
    return base.model_copy(update={"model": str(folder), "revision": None, "gguf_file": None})


def _file_of(base: Base) -> Path:
    """Return the path of the GGUF file, after downloading it if the model is on the Hub."""
    assert base.gguf_file is not None
    if not base.is_local:
        with load_errors(base.gguf_file, base.model, "downloaded"):
            return Path(hf_hub_download(base.model, base.gguf_file, revision=base.revision, local_files_only=HF_HUB_OFFLINE))
    file = Path(base.path)
    if not file.is_file():
        raise InputError(f"base.model: {file}: no such file. Give the path of a .gguf file, or set base.gguf_file: null.")
    check_pointer(file)
    return file


def _metadata(file: Path) -> dict[str, Any]:
    """Return the metadata of a GGUF file. Raises InputError if it can't be converted."""
    try:
        metadata, _ = read_gguf_metadata(str(file), ("general.languages",))
    except Exception as error:  # the reader checks nothing: a damaged file can raise anything
        raise InputError(f"base.model: {file}: not a readable GGUF file ({first_line(error)}). Download it again.") from None
    parts = metadata.get("split.count", 1)
    if parts != 1:
        raise InputError(
            f"base.model: {file}: one of {parts} parts of a split GGUF file. Merge them with `llama-gguf-split --merge`, and give the"
            " merged file."
        )
    architecture = metadata["general.architecture"]
    if architecture not in GGUF_CONFIG_ARCHS and architecture not in GGUF_SUPPORTED_ARCHITECTURES:
        raise InputError(
            f"base.model: {file}: transformers {transformers.__version__} can't read GGUF files of the architecture {architecture!r:.60}."
            " Give the model in transformers' own format."
        )
    return metadata


def _sha256(file: Path) -> str:
    status = file.stat()
    key = (file.resolve(), status.st_size, status.st_mtime_ns)
    if key not in _hashes:
        _hashes[key] = file_sha256(file)
    return _hashes[key]


def _dequantise(file: Path, metadata: dict[str, Any], folder: Path, step: Callable[[], None]) -> None:
    """Write the model and the tokenizer of a GGUF file into a new folder."""
    parent, name = str(file.parent), file.name
    dtype = _dtype_of(file)
    with load_errors("the model", str(file)), quiet(), _no_output():
        content, _ = PreTrainedConfig.get_config_dict(parent, gguf_file=name, local_files_only=True)
        check_config(content, f"base.model: {file}")
        step()
        tokenizer = AutoTokenizer.from_pretrained(parent, gguf_file=name, local_files_only=True)
        step()
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            parent,
            gguf_file=name,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with the tensor's name
            local_files_only=True,
        )
        model, info = loaded
        check_loaded(model, info, str(file), "the metadata")
        step()
        vars(model.config).pop("_model_name_or_path", None)  # the file's title, which is not a path
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
        _write_card(folder / "README.md", metadata)
        step()


def _dtype_of(file: Path) -> str:
    """Return the dtype of the dequantised model: that of the file's matrices if none is quantised, else bfloat16.

    Raises InputError if the file ends before its last tensor.
    """
    try:
        header = GgufHeader.from_file(str(file))
    except ValueError:  # a quantisation that only the gguf package knows
        return "bfloat16"
    needed = header.data_start + max((info.offset + info.nbytes for info in header.tensors), default=0)
    if (size := file.stat().st_size) < needed:
        raise InputError(f"base.model: {file}: truncated: it has {size:,} bytes of {needed:,}. Download it again.")
    return "bfloat16" if header.dtype is None else str(header.dtype).removeprefix("torch.")


def _write_card(path: Path, metadata: dict[str, Any]) -> None:
    """Write the licence and languages that the file records as the front matter of a model card."""
    card = {name: metadata[key] for key, name in _CARD.items() if key in metadata}
    card |= {"language": metadata["general.languages"]} if "general.languages" in metadata else {}
    write_text(path, f"---\n{yaml.safe_dump(card)}---\n" if card else "")


@contextmanager
def _progress(name: str, silent: bool) -> Iterator[Callable[[], None]]:
    """Show a bar over the steps on a terminal, one line elsewhere, and nothing if `silent`. Yield the function that advances it."""
    console = Console(file=sys.stderr)  # kept while stderr is redirected
    line = f"dequantising {name} into the cache"
    if silent or not console.is_terminal:
        if not silent:
            say(line)
        yield lambda: None
        return
    # the weights are one step and take minutes for large models, so a spinner and a clock show that it goes on
    with Progress(SpinnerColumn(), *Progress.get_default_columns(), TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task(line, total=len(_STEPS))
        yield lambda: bar.advance(task)


@contextmanager
def _no_output() -> Iterator[None]:
    """Drop the output of transformers' GGUF reader, whose progress bars can't be disabled."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


__all__ = ["from_gguf"]
