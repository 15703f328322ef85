"""Layers of every kind with random parameters, and checkpoints that hold them."""

import json

import torch
import yaml

from mxd_convert.base_model.load import load_base, load_tokenizer, model_sha256
from mxd_convert.base_model.swap import insert_layers
from mxd_convert.layers import LayerSpec, new_layer
from mxd_convert.recipe.schema import Base

KINDS = ("mxd", "transcoder", "skip_transcoder", "dense_assisted", "dense_twin", "random_gate")
I, H, O, N, K = 7, 11, 5, 13, 4
"""Sizes of a small layer, which fits no model."""
WIDTH, EXPERTS, ACTIVE, CONTEXT = 32, 24, 4, 32
"""Sizes of a layer of the tiny models, and the context length in the recipe of its checkpoint."""


def defaults_of(kind: str) -> dict[str, bool]:
    """Return whether a layer of a kind has a skip path and a shared expert, unless a test says otherwise."""
    return {"skip": kind == "skip_transcoder", "shared_expert": kind == "mxd"}


def shape_of(kind: str, **settings) -> LayerSpec:
    hidden = 0 if "coder" in kind else H
    experts = (0, 0) if kind == "dense_twin" else (N, K)
    return LayerSpec(kind, I, hidden, O, *experts, **{**defaults_of(kind), **settings})


def small_layer(kind: str, **settings):
    """Return a small layer in float64."""
    torch.manual_seed(0)
    layer = new_layer(shape_of(kind, **settings)).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def model_layer(kind: str, seed: int = 0, **settings):
    """Return a layer that fits the tiny models."""
    torch.manual_seed(seed)
    hidden = 0 if "coder" in kind else 40
    experts = (0, 0) if kind == "dense_twin" else (settings.pop("n_experts", EXPERTS), settings.pop("k", ACTIVE))
    layer = new_layer(LayerSpec(kind, WIDTH, hidden, WIDTH, *experts, **{**defaults_of(kind), **settings}))
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.normal_(std=1.0 if "bias" in name else 0.3)
    return layer.eval()


def checkpoint_of(folder, model, layers):
    """Save a checkpoint with these layers, as a run would."""
    base = load_base(Base(model=str(model)))
    origin = {"model": model.name, "revision": None, "sha256": model_sha256(base), "local": True}
    insert_layers(base, layers, origin).save_pretrained(folder)
    load_tokenizer(str(model)).save_pretrained(folder)
    (folder / "mxd_local.json").write_text(json.dumps({"base": str(model)}))
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"data": {"context": CONTEXT}, "train": {"mask": "bos"}}))
    return folder


def gpt2_with_layers(models, entries: dict[int, tuple[str, dict]]):
    """Return the tiny GPT-2 with layers of the given kinds, 40 experts each; experts 16 to 31 never fire."""
    base = load_base(Base(model=str(models["gpt2"])))
    layers = {}
    for index, (kind, settings) in entries.items():
        torch.manual_seed(index)
        hidden = 0 if "coder" in kind else 48
        experts = (0, 0) if kind == "dense_twin" else (40, 4)
        shape = LayerSpec(kind, WIDTH, hidden, WIDTH, *experts, activation="gelu_new", **{**defaults_of(kind), **settings})
        layers[index] = new_layer(shape)
        with torch.no_grad():
            for parameter in layers[index].parameters():
                parameter.normal_().mul_(0.3)
            if kind != "dense_twin":
                layers[index].gate.bias[16:32] = -1e3
    return insert_layers(base, layers)
