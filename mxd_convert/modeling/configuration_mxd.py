# Copyright 2026 The mxd-convert authors. Apache-2.0.
"""Configurations of models whose MLPs are replaced by Mixtures of Decoders (MxD, arXiv 2505.21364).

One file serves all architectures: `MxdLlamaConfig` is created on demand from transformers' `LlamaConfig`. It adds one key:

    "mxd": {
        "format_version": 1,
        "mlp": "model.layers.{i}.mlp",
        "layers": {"0": {"kind": "mxd", "d_in": 64, "d_hidden": 172, ...}, ...}
    }

`mlp` is the path of the module that a layer replaces. Families without an MLP module have two more keys:

- `then`: paths of the MLP's remaining modules, which pass the layer's output on unchanged.
- `flat`: only if the decoder layer flattens its tokens to one row: name of a module of the decoder layer that is called before
  that, with hidden states of shape (B, T, I).

`steering` is an optional list of steering orders.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from transformers import PretrainedConfig

from .steering_mxd import read_steering

# Version 2 adds `then` to the `mxd` entry, which readers of version 1 would ignore. Version 3 adds `shared_expert` to layers.
FORMAT_VERSION = 3
_LINEAR = {"activation": "gelu", "glu": False}  # default settings of the linear factor
_GAIN = {"sparsity": "topk"}  # default settings of the gain
_PATHS = {"skip": False, "dropout": 0.0}  # default settings of what follows
# For each kind: the sizes that an entry must have, and the defaults of its other settings.
KINDS = {
    "mxd": ({"d_in", "d_hidden", "d_out", "n_experts", "k"}, {**_LINEAR, **_GAIN, **_PATHS, "shared_expert": False}),
    "random_gate": ({"d_in", "d_hidden", "d_out", "n_experts", "k"}, {**_LINEAR, **_GAIN, **_PATHS, "shared_expert": False}),
    "transcoder": ({"d_in", "d_out", "n_experts", "k"}, {**_GAIN, "dropout": 0.0}),
    "skip_transcoder": ({"d_in", "d_out", "n_experts", "k"}, {**_GAIN, "dropout": 0.0}),
    "dense_assisted": ({"d_in", "d_hidden", "d_out", "n_experts", "k"}, {**_LINEAR, **_GAIN, **_PATHS}),
    "dense_twin": ({"d_in", "d_hidden", "d_out"}, {**_LINEAR, **_PATHS}),
}
MAX_SIZE = 2**31  # largest width or number of experts; larger tensors can't be indexed


def read_mxd(mxd: dict[str, Any]) -> dict[str, Any]:
    """Check the `mxd` entry of a config.json and return it with all defaults filled in.

    Raises ValueError, with a message of one line, if the entry is invalid.
    """
    if not isinstance(mxd, dict):
        raise ValueError(f"config.json: mxd is {mxd!r}; expected format_version, mlp and layers")
    version = mxd.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise ValueError(f"config.json: mxd.format_version is {version!r}; expected a whole number from 1")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"config.json: this checkpoint has MxD format version {version}, and this code reads up to {FORMAT_VERSION}. Upgrade mxd-convert."
        )
    if not _is_path(mxd.get("mlp")):
        raise ValueError(f"config.json: mxd.mlp is {mxd.get('mlp')!r:.80}; expected a module path such as model.layers.{{i}}.mlp")
    then = mxd.get("then", [])
    if not isinstance(then, list) or not all(map(_is_path, then)):
        raise ValueError(f"config.json: mxd.then is {then!r:.80}; expected module paths such as model.layers.{{i}}.fc2")
    flat = mxd.get("flat")
    if flat is not None and not (isinstance(flat, str) and flat.isidentifier() and then):
        raise ValueError(f"config.json: mxd.flat is {flat!r:.80}; expected the name of a module, such as fc1, next to mxd.then")
    layers = mxd.get("layers")
    if not isinstance(layers, dict) or not layers or not all(re.fullmatch("0|[1-9][0-9]{0,5}", str(index)) for index in layers):
        raise ValueError(
            'config.json: mxd.layers is not a mapping of layer indices to layers; expected, for example, {"0": {...}}'
        )
    complete = {str(index): _read_layer(index, layers[index]) for index in sorted(layers, key=int)}
    steering = {"steering": read_steering(mxd["steering"], complete)} if "steering" in mxd else {}
    return {**mxd, "layers": complete, **steering}


def _read_layer(index: str, entry: Any) -> dict[str, Any]:
    where = f"config.json: mxd.layers.{index}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {entry!r:.80}; expected its widths and experts")
    kind = entry.get("kind", "mxd")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{where}: kind {kind!r:.80} is not known to this code. Upgrade mxd-convert.")
    sizes, defaults = KINDS[kind]
    layer = {"kind": kind, **defaults, **entry}
    if wrong := set(layer) ^ {"kind", *sizes, *defaults}:
        problem = "missing" if wrong <= sizes else "unknown"
        raise ValueError(
            f"{where}: {problem} key {sorted(wrong)[0]!r:.80}; expected {', '.join(['kind', *sorted(sizes), *defaults])}"
        )
    for key in sorted(sizes):
        if type(layer[key]) is not int or not 1 <= layer[key] <= MAX_SIZE:
            raise ValueError(f"{where}.{key} is {layer[key]!r:.80}; expected a whole number from 1")
    for key, default in defaults.items():
        types = (int, float) if isinstance(default, float) else (type(default),)
        if type(layer[key]) not in types or (key == "dropout" and not 0 <= layer[key] < 1):
            raise ValueError(f"{where}.{key} is {layer[key]!r:.80}; expected a value such as {default!r}")
    return without_newer(layer)


def without_newer(layer: dict[str, Any]) -> dict[str, Any]:
    """Return a layer's entry without keys of later format versions that have their defaults, for readers of earlier versions."""
    return {key: value for key, value in layer.items() if key != "shared_expert" or value}


def _is_path(path: Any) -> bool:
    """Return whether `path` is a module path with {i} for the layer, such as `model.layers.{i}.mlp`."""
    return isinstance(path, str) and re.fullmatch(r"(\w+\.)*\{i\}(\.\w+)*", path, re.ASCII) is not None


def format_version(then: Sequence[str], layers: Mapping[str, Mapping[str, Any]]) -> int:
    """Return the oldest format version that supports an `mxd` entry with this `then` and these layers."""
    return 3 if any(layer.get("shared_expert") for layer in layers.values()) else 2 if then else 1


def mlp_paths(mxd: Mapping[str, Any], index: int | str) -> tuple[str, ...]:
    """Return the prefixes of the tensor names of a layer and of the modules that it replaces."""
    return tuple(f"{path.format(i=index)}." for path in (mxd["mlp"], *mxd.get("then", [])))


def config_class(stem: str) -> type[PretrainedConfig]:
    """Return the MxD counterpart of transformers' `<stem>Config`, with model_type `mxd_<base>`.

    Raises AttributeError if transformers has no such class.
    """
    name = f"Mxd{stem}Config"
    if name not in globals():
        base = getattr(transformers, f"{stem}Config", None)
        if base is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}: this transformers has no {stem}Config")
        globals()[name] = make_config(stem, base)
    return globals()[name]


def make_config(stem: str, base: Any, module: str = __name__, prefix: str = "mxd_") -> type[PretrainedConfig]:
    """Create the MxD counterpart of a config class.

    Args:
        stem: architecture name, such as `Llama`.
        base: config class to extend.
        module: value of `__module__`. The checkpoint ships this file and that of the model classes, whose name has `modeling`
            instead of `configuration`.
        prefix: prefix of the model_type.
    """
    name, home = f"Mxd{stem}Config", module.rpartition(".")[2]

    def post_init(self: Any, **kwargs: Any) -> None:
        base.__post_init__(self, **kwargs)
        if self.mxd is not None:
            self.mxd = read_mxd(self.mxd)
        if getattr(self, "auto_map", None) is None:
            models = home.replace("configuration", "modeling")
            self.auto_map = {
                "AutoConfig": f"{home}.{name}",
                "AutoModel": f"{models}.Mxd{stem}Model",
                "AutoModelForCausalLM": f"{models}.Mxd{stem}ForCausalLM",
            }
            if "text_config" in base.sub_configs:  # a model with images too
                self.auto_map["AutoModelForImageTextToText"] = self.auto_map["AutoModelForCausalLM"]
        self.validate()  # a strict dataclass validates itself, but a subclass made by `type` does not

    # The base's tensor-parallel plan names the projections of MLPs, which may be replaced.
    plan = base.base_model_tp_plan and {key: value for key, value in base.base_model_tp_plan.items() if ".mlp." not in key}
    members = {
        "__module__": module,
        "__doc__": f"{base.__name__} of a model with MxD layers.",
        "__annotations__": {"mxd": dict[str, Any] | None},
        "__post_init__": post_init,
        "mxd": None,
        "model_type": f"{prefix}{base.model_type}",
        "base_model_tp_plan": plan,
        "_auto_class": "AutoConfig",  # makes save_pretrained copy this file into the checkpoint
    }
    return type(name, (base,), members)


def __getattr__(name: str) -> Any:
    if name.startswith("Mxd") and name.endswith("Config"):
        return config_class(name[len("Mxd") : -len("Config")])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
