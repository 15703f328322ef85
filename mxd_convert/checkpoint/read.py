"""A finished folder: read with errors that say what to do, and the base model that it came from."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from mxd_convert.base_model.families import kept_mlp
from mxd_convert.base_model.load import (
    WEIGHTS_HELP,
    check_adapters,
    check_config,
    explained,
    load_base,
    model_sha256,
    quiet,
    untied_tensors,
)
from mxd_convert.base_model.remote_code import class_in, is_trusted
from mxd_convert.errors import InputError, first_line
from mxd_convert.files import check_links, check_output, check_pointer, put_in_place, read_mapping, scratch_beside
from mxd_convert.modeling import configuration_mxd, modeling_mxd
from mxd_convert.recipe.load import read_recipe_yaml
from mxd_convert.recipe.schema import Base
from mxd_convert.report.schema import Report, read_report_file

LOCAL = "mxd_local.json"
REPORT = "mxd_report.json"
DASHBOARD = "dashboard"  # folder of one, where a run has written it
ONNX = "onnx"  # the same of an export
DELTA = "mxd_delta.json"  # marks a folder as what a conversion changed, without the base's weights


def read_config(folder: str | Path) -> Any:
    """The config of a converted checkpoint. Raises InputError where the folder holds none, or one that can't be trusted to be one."""
    folder = Path(folder)
    check_folder(folder)
    path = folder / "config.json"
    if not path.is_file():
        if (folder / DELTA).is_file():
            raise InputError(f"{folder}: a delta; `mxd-convert apply {folder} DIR` makes the full checkpoint of it")
        place = folder.resolve()
        unfinished = place.name.endswith(".partial") or place.parent.joinpath(f"{place.name}.partial").is_dir()
        raise InputError(f"{folder}: no config.json, so not a checkpoint" + ("; its run has not finished" if unfinished else ""))
    content = read_mapping(path)
    if not str(content.get("model_type")).startswith("mxd_"):
        kind = f"a {str(content.get('model_type'))[:60]!r} model"
        raise InputError(f"{folder}: config.json is of {kind}, not of one with MxD layers; `mxd-convert run` makes those")
    if not isinstance(content.get("mxd"), dict):
        raise InputError(f"{folder}: config.json: mxd is {content.get('mxd')!r:.60}; expected format_version, mlp and layers")
    check_config(content, str(path))
    with explained("its config.json", str(folder)), quiet():
        config = _config_type(folder, content).from_dict(content)
        config.name_or_path = str(folder)
        return config


def check_folder(folder: Path) -> None:
    """Raise InputError where a folder is none, or holds what must not be there: a link that leaves it, or an adapter beside the weights."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
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
            f"{folder}: this transformers has no {stem}Config, which the checkpoint needs; upgrade transformers"
        ) from None


def load_checkpoint(folder: str | Path, dtype: str = "auto", finite: bool = False) -> Any:
    """A converted model from its folder, in evaluation mode. Raises InputError for missing, damaged or ill-fitting weights.

    finite: whether weights that hold NaN or an infinity are refused too, since nothing that they compute would mean anything.
    """
    folder = Path(folder)
    config = read_config(folder)
    found = tensor_shapes(folder)
    layers = config.get_text_config().num_hidden_layers
    if not isinstance(layers, int) or not 0 < layers <= len(found):  # each has several; a model of millions takes hours to build
        raise InputError(
            f"{folder}: the weights don't fit config.json: it says {layers!r:.40} layers and the weights hold {len(found)} tensors;"
            " download it or convert again"
        )
    with explained("the model that config.json describes", str(folder), "built"), quiet():
        model_class = class_of(folder, config)
        with torch.device("meta"):
            expected = {name: list(tensor.shape) for name, tensor in untied_tensors(model_class(config)).items()}
    check_tensors(folder, expected, found)
    with explained("the checkpoint", str(folder)), quiet():
        model = model_class.from_pretrained(folder, config=config, dtype=dtype, use_safetensors=True)
    if finite:
        check_finite(folder, model)
    return model.eval().requires_grad_(False)


def not_finite(model: Any) -> str | None:
    """The name of the first of a model's tensors that holds NaN or an infinity; None where all numbers are finite."""
    return next((name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()), None)


def check_finite(folder: str | Path, model: Any) -> None:
    """Raise InputError where the weights of a loaded checkpoint hold NaN or an infinity."""
    if (name := not_finite(model)) is not None:
        raise InputError(f"{folder}: the tensor {name} holds numbers that are not finite; download it or convert again")


def read_report(folder: Path) -> Report | None:
    """The report of a checkpoint, its form checked; None where there is none. Raises InputError."""
    return read_report_file(folder / REPORT) if (folder / REPORT).is_file() else None


def recipe_of(folder: Path) -> str:
    """The text of the recipe that travels with a checkpoint, "" where there is none. Raises InputError for one that can't be read."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        return ""
    read_recipe_yaml(path)
    return path.read_text(encoding="utf-8-sig")


def class_of(folder: Path, config: Any) -> Any:
    """The class of a checkpoint's model. folder: where its code is, if that is not ours."""
    own = class_in(folder, config.auto_map, "AutoModelForCausalLM")
    return own or getattr(modeling_mxd, type(config).__name__.removesuffix("Config") + "ForCausalLM")


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint, those that transformers reads: one of all tensors, else those of the index. Raises InputError."""
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        weights = read_mapping(index).get("weight_map")
        names = set(weights.values()) if isinstance(weights, dict) and all(map(_is_text, weights.values())) else set()
        if not names:
            raise InputError(f"{index}: not a readable index of weight files; download it or convert again")
        for name in names:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise InputError(
                    f"{index}: weight_map names {name!r:.80}, outside of the checkpoint; download it or convert again"
                )
        files = [folder / name for name in sorted(names)]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: missing; download it or convert again")
        check_pointer(file)
    return files


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """The shapes of a checkpoint's tensors, by name, from the headers of its weight files. Raises InputError."""
    found: dict[str, list[int]] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: {WEIGHTS_HELP} ({first_line(error)})") from None
    return found


def check_tensors(folder: Path, expected: dict[str, list[int]], found: dict[str, list[int]]) -> None:
    """Compare the shapes of the tensors on disk with those that the config makes. Raises InputError for the first difference."""
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise InputError(f"{folder}: the weights don't fit config.json: missing tensor {name}; download it or convert again")
        if name not in expected:
            raise InputError(
                f"{folder}: the weights don't fit config.json: unexpected tensor {name:.200}; download it or convert again"
            )
        if found[name] != expected[name]:
            raise InputError(
                f"{folder}: the weights don't fit config.json: {name} has shape {found[name]} where it makes {expected[name]}"
            )


def base_of(folder: str | Path, override: str | None = None) -> Base:
    """The base model that a checkpoint came from: `override`, the local path kept beside it, or the recorded id. Raises InputError."""
    return chosen_base(Path(folder), recorded_base(read_config(folder)), override)


def chosen_base(folder: Path, recorded: Mapping[str, Any], override: str | None) -> Base:
    """The same for whatever keeps beside it what it knows of its base. recorded: the base's id, revision, and whether it was local."""
    try:
        return _chosen_base(folder, recorded, override)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise InputError(
            f"{folder}: what it says of its base model can't be read: {problem['loc'][-1] if problem['loc'] else 'mlp'} is"
            f" {problem['input']!r:.60}; download it again, or give the base with --base PATH"
        ) from None


def _chosen_base(folder: Path, recorded: Mapping[str, Any], override: str | None) -> Base:
    more: dict[str, Any] = {"mlp": kept_mlp(recorded), "trust_remote_code": is_trusted()}
    if override is not None:
        path = Path(override).expanduser()
        if path.exists():
            return Base(model=str(path.resolve()), **more)
        return Base(model=override, revision=recorded.get("revision") if override == recorded.get("model") else None, **more)
    local = read_local(folder).get("base")
    if isinstance(local, str) and Path(local).is_dir():
        return Base(model=local, **more)
    if recorded.get("local", False) or not recorded.get("model"):
        raise InputError(
            f"{folder}: its base model {recorded.get('model') or ''} was a local folder that is not here; give it with --base PATH"
        )
    return Base(model=recorded["model"], revision=recorded.get("revision"), **more)


def is_converted(folder: Path) -> bool:
    """Whether a folder holds, whole or damaged, a checkpoint with MxD layers."""
    try:
        return '"mxd_' in (folder / "config.json").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def belonging(folder: Path) -> list[str]:
    """The files that belong to a checkpoint, by path: all but hidden ones, what is of this machine only, the
    dashboard, for people, and the ONNX export, which is a model of its own."""
    paths = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in paths if belongs(path)]


def belongs(path: str) -> bool:
    parts = path.split("/")
    return parts[-1] != LOCAL and parts[0] not in (DASHBOARD, ONNX) and not any(part.startswith(".") for part in parts)


def recorded_base(config: Any) -> dict[str, Any]:
    """What config.json says of the base model; empty where it says nothing."""
    recorded = (config.mxd or {}).get("base")
    return recorded if isinstance(recorded, dict) else {}


def check_base(converted: Any, original: Any, name: str) -> None:
    """Raises InputError where `original` is not the model that `converted` came from, by the hash of its tensors."""
    recorded = recorded_base(converted.config).get("sha256")
    if recorded is not None and model_sha256(original) != recorded:
        raise InputError(
            f"{name}: not the model that this checkpoint came from (the hash of its tensors differs); give the right one with --base"
        )


def original_of(folder: str | Path, converted: Any, override: str | None = None) -> Any:
    """The very base model that a loaded checkpoint came from, in its own dtype. override: as in `base_of`. Raises InputError."""
    settings = base_of(folder, override)
    original = load_base(settings, dtype="auto")
    check_base(converted, original, settings.model)
    return original


def check_new(output: Path, checkpoint: Path) -> None:
    """Raises InputError where something is at `output` already, or it lies inside the checkpoint that it is made of."""
    check_output(output)
    if checkpoint.resolve() in output.resolve().parents:
        raise InputError(f"{output}: lies inside the checkpoint; choose another folder")
    if output.exists() and any(output.iterdir()):
        raise InputError(f"{output}: exists already; choose another folder")


@contextmanager
def new_folder(output: Path, checkpoint: Path) -> Iterator[Path]:
    """A folder beside `output` that becomes it at the end, and is gone where something goes wrong. Raises InputError as `check_new` does."""
    check_new(output, checkpoint)
    with scratch_beside(output) as scratch, quiet():
        work = scratch / "new"
        work.mkdir()
        yield work
        put_in_place(work, output, scratch)


def read_local(folder: Path) -> dict[str, Any]:
    """What is kept of this machine beside a checkpoint, and is not published; empty where there is none or it can't be read."""
    try:
        return read_mapping(folder / LOCAL)
    except InputError:
        return {}


def same_outside_layers(converted: Any, base: Any) -> str | None:
    """None where every tensor outside the MxD layers is the base's, bit for bit; else the name of the first that is not."""
    mxd = converted.config.mxd
    paths = tuple(path for index in mxd["layers"] for path in configuration_mxd.mlp_paths(mxd, index))
    ours = {name: tensor for name, tensor in untied_tensors(converted).items() if not name.startswith(paths)}
    theirs = {name: tensor for name, tensor in untied_tensors(base).items() if not name.startswith(paths)}
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs or ours[name].dtype != theirs[name].dtype or not ours[name].equal(theirs[name]):
            return name
    return None


MOST_CONTEXT = 2**22  # tokens of a block that a recipe from anywhere may ask for


def checkpoint_settings(folder: Path) -> tuple[int, bool]:
    """Block length and masking as in the recipe that travels with the checkpoint, or the defaults."""
    limit = getattr(read_config(folder), "max_position_embeddings", None)
    path = folder / "recipe.yaml"
    recipe = read_recipe_yaml(path) if path.is_file() else {}
    settings = {"data.context": 128, "train.mask_bos": True}
    for key, default in settings.items():
        section, _, name = key.partition(".")
        keys = recipe.get(section, {})
        if not isinstance(keys, dict):
            raise InputError(
                f"{path}: {section} is {keys!r:.60}, not a readable recipe's section; take the file away, or mend it"
            )
        value = keys.get(name, default)
        if type(value) is not type(default) or (key == "data.context" and not 2 <= value <= MOST_CONTEXT):
            raise InputError(
                f"{path}: {key} is {value!r:.60}; expected {'true or false' if default is True else f'a number from 2 to {MOST_CONTEXT:,}'}."
                " Take the file away to evaluate with blocks of 128 tokens"
            )
        settings[key] = value
    context, mask_bos = int(settings["data.context"]), bool(settings["train.mask_bos"])
    return min(context, limit) if isinstance(limit, int) else context, mask_bos
