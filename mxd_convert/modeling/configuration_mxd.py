# Copyright 2026 The mxd-convert authors. Apache-2.0.
"""Configurations of models whose MLPs are Mixtures of Decoders (MxD, arXiv 2505.21364).

One file serves every architecture: `MxdLlamaConfig` is made, on demand, from transformers' own `LlamaConfig`. It adds one key:

    "mxd": {"format_version": 1, "mlp": "model.layers.{i}.mlp", "layers": {"0": {"d_in": 64, "d_hidden": 172, ...}, ...}}
"""

from typing import Any

import transformers
from transformers import PretrainedConfig

FORMAT_VERSION = 1
LAYER_DEFAULTS = {"kind": "mxd", "activation": "gelu", "glu": False, "sparsity": "topk", "skip": False, "dropout": 0.0}
LAYER_KEYS = {"d_in", "d_hidden", "d_out", "n_experts", "k", *LAYER_DEFAULTS}


def read_mxd(mxd: dict[str, Any]) -> dict[str, Any]:
    """Checks the `mxd` entry of a config.json and completes its layers. Raises ValueError, one line, where it can't be read."""
    if not isinstance(mxd, dict):
        raise ValueError(f"config.json: mxd is {mxd!r}; expected format_version, mlp and layers")
    version = mxd.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise ValueError(f"config.json: mxd.format_version is {version!r}; expected a whole number from 1")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"config.json: this checkpoint has MxD format version {version} and this code reads up to {FORMAT_VERSION}; upgrade mxd-convert"
        )
    if not isinstance(mxd.get("mlp"), str) or "{i}" not in mxd["mlp"]:
        raise ValueError(f"config.json: mxd.mlp is {mxd.get('mlp')!r}; expected a module path such as model.layers.{{i}}.mlp")
    layers = mxd.get("layers")
    if not isinstance(layers, dict) or not layers or not all(str(index).isdigit() for index in layers):
        raise ValueError('config.json: mxd.layers must map layer indices to layers, as in {"0": {...}}')
    complete = {}
    for index in sorted(layers, key=int):
        if not isinstance(layers[index], dict):
            raise ValueError(f"config.json: mxd.layers.{index} is {layers[index]!r}; expected its widths and experts")
        layer = {**LAYER_DEFAULTS, **layers[index]}
        if wrong := set(layer) ^ LAYER_KEYS:
            problem = "missing" if wrong <= LAYER_KEYS else "unknown"
            raise ValueError(f"config.json: mxd.layers.{index}: {problem} key {sorted(wrong)[0]!r}")
        if layer["kind"] != "mxd":
            raise ValueError(
                f"config.json: mxd.layers.{index}: kind {layer['kind']!r} is not known to this code; upgrade mxd-convert"
            )
        for key in ("d_in", "d_hidden", "d_out", "n_experts", "k"):
            if not isinstance(layer[key], int) or layer[key] < 1:
                raise ValueError(f"config.json: mxd.layers.{index}.{key} is {layer[key]!r}; expected a whole number from 1")
        complete[str(index)] = layer
    return {**mxd, "layers": complete}


def config_class(stem: str) -> type[PretrainedConfig]:
    """The MxD counterpart of transformers' `<stem>Config`: model_type `mxd_<base>`. Raises AttributeError if there is no such base."""
    name = f"Mxd{stem}Config"
    if name in globals():
        return globals()[name]
    base = getattr(transformers, f"{stem}Config", None)
    if base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}: this transformers has no {stem}Config")

    def post_init(self: Any, **kwargs: Any) -> None:
        base.__post_init__(self, **kwargs)
        if self.mxd is not None:
            self.mxd = read_mxd(self.mxd)
        if getattr(self, "auto_map", None) is None:
            self.auto_map = {
                "AutoConfig": f"configuration_mxd.{name}",
                "AutoModel": f"modeling_mxd.Mxd{stem}Model",
                "AutoModelForCausalLM": f"modeling_mxd.Mxd{stem}ForCausalLM",
            }

    # the tensor-parallel plan of the base names the projections of MLPs that may no longer be there
    plan = {key: value for key, value in (base.base_model_tp_plan or {}).items() if ".mlp." not in key}
    members = {
        "__module__": __name__,
        "__doc__": f"{base.__name__} of a model with MxD layers.",
        "__annotations__": {"mxd": dict[str, Any] | None},
        "__post_init__": post_init,
        "mxd": None,
        "model_type": f"mxd_{base.model_type}",
        "base_model_tp_plan": plan,
        "_auto_class": "AutoConfig",  # save_pretrained then copies this file into the checkpoint
    }
    globals()[name] = type(name, (base,), members)
    return globals()[name]


def __getattr__(name: str) -> Any:
    if name.startswith("Mxd") and name.endswith("Config"):
        return config_class(name[len("Mxd") : -len("Config")])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
