"""Reading of converted checkpoints and their base models, with errors that give the fix."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from mxd_convert.base_model.checks import WEIGHTS_HELP, check_adapters, check_config, load_errors, quiet
from mxd_convert.base_model.families import kept_mlp
from mxd_convert.base_model.load import load_base, model_sha256, stored_tensors, untied_tensors
from mxd_convert.base_model.remote_code import class_in, is_trusted
from mxd_convert.errors import InputError, first_line
from mxd_convert.files import check_links, check_output, check_pointer, move_into_place, read_mapping, temporary_sibling
from mxd_convert.modeling import configuration_mxd, modeling_mxd
from mxd_convert.recipe.load import read_recipe_yaml
from mxd_convert.recipe.schema import MASKED, Base
from mxd_convert.report.schema import Report, read_report_file

LOCAL = "mxd_local.json"
REPORT = "mxd_report.json"
DASHBOARD = "dashboard"  # folder of the dashboard inside a checkpoint
ONNX = "onnx"  # folder of the ONNX export inside a checkpoint
DELTA = "mxd_delta.json"  # marks a folder as a delta checkpoint, which has no weights of the base


def read_config(folder: str | Path) -> Any:
    """Return the config of a converted checkpoint. Raises InputError if the folder has none or an invalid one."""
    folder = Path(folder)
    check_folder(folder)
    path = folder / "config.json"
    if not path.is_file():
        if (folder / DELTA).is_file():
            raise InputError(f"{folder}: a delta, not a full checkpoint. Rebuild it with `mxd-convert apply {folder} DIR`.")
        target = folder.resolve()
        unfinished = target.name.endswith(".partial") or target.parent.joinpath(f"{target.name}.partial").is_dir()
        fix = (
            "Its run has not finished. Resume it with `mxd-convert run`."
            if unfinished
            else "Give the folder of a converted model."
        )
        raise InputError(f"{folder}: no config.json, so not a checkpoint. {fix}")
    content = read_mapping(path)
    if not str(content.get("model_type")).startswith("mxd_"):
        kind = f"a {str(content.get('model_type'))[:60]!r} model"
        raise InputError(f"{folder}: config.json is of {kind}, not of one with MxD layers. Create one with `mxd-convert run`.")
    if not isinstance(content.get("mxd"), dict):
        raise InputError(f"{folder}: config.json: mxd is {content.get('mxd')!r:.60}; expected format_version, mlp and layers")
    check_config(content, str(path))
    with load_errors("its config.json", str(folder)), quiet():
        config = _config_type(folder, content).from_dict(content)
        config.name_or_path = str(folder)
        return config


def check_folder(folder: Path) -> None:
    """Raise InputError if `folder` is not a folder, or contains an adapter or a symbolic link that points out of it."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder. Give the folder of a converted model.")
    check_links(folder)
    check_adapters(folder)


def _config_type(folder: Path, content: dict[str, Any]) -> Any:
    architectures = content.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(architecture, str) or not re.fullmatch(r"Mxd\w+ForCausalLM", architecture):
        raise InputError(f"{folder}: config.json: architectures is {architectures!r:.80}; expected one Mxd...ForCausalLM")
    stem = architecture.removeprefix("Mxd").removesuffix("ForCausalLM")
    try:
        return class_in(folder, content.get("auto_map"), "AutoConfig") or configuration_mxd.config_class(stem)
    except AttributeError:
        raise InputError(
            f"{folder}: this transformers has no {stem}Config, which the checkpoint needs. Upgrade transformers."
        ) from None


def load_checkpoint(folder: str | Path, dtype: str = "auto", finite: bool = False) -> Any:
    """Return a converted model in evaluation mode, without gradients.

    Args:
        folder: The checkpoint.
        dtype: A dtype by name, or "auto" for the checkpoint's own.
        finite: Whether to refuse weights with NaN or infinities.

    Raises:
        InputError: If weights are missing, damaged, or don't fit the config.
    """
    folder = Path(folder)
    config = read_config(folder)
    found = tensor_shapes(folder)
    layers = config.get_text_config().num_hidden_layers
    # every layer has several tensors; a model with a false count of millions of layers takes hours to build
    if not isinstance(layers, int) or not 0 < layers <= len(found):
        raise InputError(
            f"{folder}: the weights don't fit config.json: it says {layers!r:.40} layers, but the weights have {len(found)} tensors."
            " Download it or convert again."
        )
    with load_errors("the model that config.json describes", str(folder), "built"), quiet():
        model_class = class_of(folder, config)
        with torch.device("meta"):
            expected = {name: list(tensor.shape) for name, tensor in stored_tensors(model_class(config)).items()}
    check_tensors(folder, expected, found)
    with load_errors("the checkpoint", str(folder)), quiet():
        model = model_class.from_pretrained(folder, config=config, dtype=dtype, use_safetensors=True)
    if finite:
        check_finite(folder, model)
    return model.eval().requires_grad_(False)


def not_finite(model: Any) -> str | None:
    """Return the name of a model's first tensor with NaN or infinities, or None if all numbers are finite."""
    return next((name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()), None)


def check_finite(folder: str | Path, model: Any) -> None:
    """Raise InputError if the weights of a loaded checkpoint contain NaN or infinities."""
    if (name := not_finite(model)) is not None:
        raise InputError(f"{folder}: the tensor {name} has numbers that are not finite. Download it or convert again.")


def read_report(folder: Path) -> Report | None:
    """Return the validated report of a checkpoint, or None if it has no report. Raises InputError if the report is invalid."""
    return read_report_file(folder / REPORT) if (folder / REPORT).is_file() else None


def recipe_of(folder: Path) -> str:
    """Return the text of a checkpoint's recipe, or "" if it has none. Raises InputError if the recipe is invalid."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        return ""
    read_recipe_yaml(path)
    return path.read_text(encoding="utf-8-sig")


def class_of(folder: Path, config: Any) -> Any:
    """Return the class of a checkpoint's model. folder: the source of its code, if the base model has custom code."""
    own = class_in(folder, config.auto_map, "AutoModelForCausalLM")
    return own or getattr(modeling_mxd, type(config).__name__.removesuffix("Config") + "ForCausalLM")


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers reads: `model.safetensors`, else those in the index.

    Raises InputError if a file is missing, or the index is invalid or names files outside of the checkpoint.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        weights = read_mapping(index).get("weight_map")
        names = set(weights.values()) if isinstance(weights, dict) and all(map(_is_text, weights.values())) else set()
        if not names:
            raise InputError(f"{index}: not a readable index of weight files. Download it or convert again.")
        for name in names:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise InputError(
                    f"{index}: weight_map names {name!r:.80}, outside of the checkpoint. Download it or convert again."
                )
        files = [folder / name for name in sorted(names)]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: missing. Download it or convert again.")
        check_pointer(file)
    return files


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Return the shapes of a checkpoint's tensors by name, from the headers of its weight files.

    Raises InputError if a weight file is missing or damaged.
    """
    found: dict[str, list[int]] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: can't be read ({first_line(error)}). {WEIGHTS_HELP}") from None
    return found


def check_tensors(folder: Path, expected: dict[str, list[int]], found: dict[str, list[int]]) -> None:
    """Raise InputError if the shapes of the tensors on disk (`found`) differ from those of the config's model (`expected`)."""
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise InputError(f"{folder}: the weights don't fit config.json: missing tensor {name}. Download it or convert again.")
        if name not in expected:
            raise InputError(
                f"{folder}: the weights don't fit config.json: unexpected tensor {name:.200}. Download it or convert again."
            )
        if found[name] != expected[name]:
            raise InputError(
                f"{folder}: the weights don't fit config.json: {name} has shape {found[name]}, expected {expected[name]}."
                " Download it or convert again."
            )


def base_of(folder: str | Path, override: str | None = None) -> Base:
    """Return the base model of a checkpoint: `override`, else the local path in `mxd_local.json`, else the recorded id.

    Raises InputError if the base was a local folder that is not on this machine, or the record is invalid.
    """
    return chosen_base(Path(folder), recorded_base(read_config(folder)), override)


def chosen_base(folder: Path, recorded: Mapping[str, Any], override: str | None) -> Base:
    """Return the base model of a checkpoint or delta, as `base_of` does.

    recorded: the base's id, its revision and GGUF file, and whether it was local.
    """
    try:
        return _chosen_base(folder, recorded, override)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise InputError(
            f"{folder}: its record of the base model is invalid: {problem['loc'][-1] if problem['loc'] else 'base'} is"
            f" {problem['input']!r:.60}. Download it again, or give the base with --base PATH."
        ) from None


def _chosen_base(folder: Path, recorded: Mapping[str, Any], override: str | None) -> Base:
    more: dict[str, Any] = {"mlp": kept_mlp(recorded), "trust_remote_code": is_trusted()}
    if override is not None:
        path = Path(override).expanduser()
        if path.exists():
            file = path / str(recorded.get("gguf_file"))
            is_of_gguf = file.is_file() and not (path / "config.json").is_file()
            return Base(model=str((file if is_of_gguf else path).resolve()), **more)
        if override == recorded.get("model"):
            more |= {"revision": recorded.get("revision"), "gguf_file": recorded.get("gguf_file")}
        return Base(model=override, **more)
    local = read_local(folder).get("base")
    if isinstance(local, str) and Path(local).exists():
        return Base(model=local, **more)
    if recorded.get("local", False) or not recorded.get("model"):
        raise InputError(
            f"{folder}: its base model {recorded.get('model') or ''} was local, and is not on this machine. Give it with --base PATH."
        )
    return Base(model=recorded["model"], revision=recorded.get("revision"), gguf_file=recorded.get("gguf_file"), **more)


def is_converted(folder: Path) -> bool:
    """Return whether a folder has a checkpoint with MxD layers, which may be damaged."""
    try:
        return '"mxd_' in (folder / "config.json").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def belonging(folder: Path) -> list[str]:
    """Return the relative paths of the files that belong to a checkpoint, as `belongs` decides."""
    paths = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in paths if belongs(path)]


def belongs(path: str) -> bool:
    """Return whether a relative path belongs to a checkpoint.

    Hidden files, `mxd_local.json`, the dashboard and the ONNX export don't.
    """
    parts = path.split("/")
    return parts[-1] != LOCAL and parts[0] not in (DASHBOARD, ONNX) and not any(part.startswith(".") for part in parts)


def recorded_base(config: Any) -> dict[str, Any]:
    """Return the record of the base model in config.json, or {} without one."""
    recorded = (config.mxd or {}).get("base")
    return recorded if isinstance(recorded, dict) else {}


def check_base(converted: Any, original: Any, name: str) -> None:
    """Raise InputError if the hash of `original` is not that of the base model that `converted` records. name: of the base."""
    recorded = recorded_base(converted.config).get("sha256")
    if recorded is not None and model_sha256(original) != recorded:
        raise InputError(
            f"{name}: not the base model of this checkpoint (the hash of its tensors differs). Give the right one with --base."
        )


def original_of(folder: str | Path, converted: Any, override: str | None = None) -> Any:
    """Return the base model of a loaded checkpoint, in its own dtype. override: as in `base_of`.

    Raises InputError if the base is not available, or its hash is not the recorded one.
    """
    settings = base_of(folder, override)
    original = load_base(settings, dtype="auto")
    check_base(converted, original, settings.model)
    return original


def check_new(output: Path, checkpoint: Path) -> None:
    """Raise InputError if `output` exists and is not empty, or is inside `checkpoint`."""
    check_output(output)
    if checkpoint.resolve() in output.resolve().parents:
        raise InputError(f"{output}: lies inside the checkpoint. Choose another folder.")
    if output.exists() and any(output.iterdir()):
        raise InputError(f"{output}: exists already. Choose another folder.")


@contextmanager
def new_folder(output: Path, checkpoint: Path) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to `output` if the block succeeds and removed otherwise.

    Raises InputError as `check_new` does.
    """
    check_new(output, checkpoint)
    with temporary_sibling(output) as scratch, quiet():
        folder = scratch / "new"
        folder.mkdir()
        yield folder
        move_into_place(folder, output, scratch)


def read_local(folder: Path) -> dict[str, Any]:
    """Return the content of `mxd_local.json`, which is never published, or {} if it is missing or invalid."""
    try:
        return read_mapping(folder / LOCAL)
    except InputError:
        return {}


def same_outside_layers(converted: Any, base: Any) -> str | None:
    """Return the name of the first tensor outside the MxD layers that is not bit-identical to the base's, or None."""
    mxd = converted.config.mxd
    paths = tuple(path for index in mxd["layers"] for path in configuration_mxd.mlp_paths(mxd, index))
    ours = {name: tensor for name, tensor in untied_tensors(converted).items() if not name.startswith(paths)}
    theirs = {name: tensor for name, tensor in untied_tensors(base).items() if not name.startswith(paths)}
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs or ours[name].dtype != theirs[name].dtype or not ours[name].equal(theirs[name]):
            return name
    return None


MAX_CONTEXT = 2**22  # tokens; longest block that an untrusted recipe may set


def checkpoint_settings(folder: Path) -> tuple[int, str]:
    """Return (block length in tokens, `train.mask`: which tokens don't count) of the checkpoint's recipe.

    Defaults: 128, bos. The block length is at most the model's `max_position_embeddings`. Raises InputError if the recipe's values
    are invalid.
    """
    limit = getattr(read_config(folder).get_text_config(), "max_position_embeddings", None)
    path = folder / "recipe.yaml"
    recipe = read_recipe_yaml(path) if path.is_file() else {}
    for section in ("data", "train"):
        if not isinstance(recipe.get(section, {}), dict):
            raise InputError(
                f"{path}: {section} is {recipe[section]!r:.60}, not a section of a recipe. Correct the file or remove it."
            )
    context, train = recipe.get("data", {}).get("context", 128), recipe.get("train", {})
    if type(context) is not int or not 2 <= context <= MAX_CONTEXT:
        raise _wrong(path, "data.context", context, f"a number from 2 to {MAX_CONTEXT:,}")
    if "mask_bos" in train:  # recipes before version 0.2
        if type(train["mask_bos"]) is not bool:
            raise _wrong(path, "train.mask_bos", train["mask_bos"], "true or false")
        mask = "bos" if train["mask_bos"] else "none"
    else:
        mask = train.get("mask", "bos")
        if not isinstance(mask, str) or mask not in MASKED:
            raise _wrong(path, "train.mask", mask, ", ".join(MASKED))
    return min(context, limit) if isinstance(limit, int) else context, mask


def _wrong(path: Path, key: str, value: Any, expected: str) -> InputError:
    return InputError(
        f"{path}: {key} is {value!r:.60}; expected {expected}. Remove the file to evaluate with blocks of 128 tokens."
    )
