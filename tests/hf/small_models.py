"""The models that the tests of other libraries are run on: tiny ones of a family, and their converted counterparts."""

import copy
from functools import cache
from typing import Any

import torch
from mixtures import sites_of
from outcomes import FAMILIES
from tiny_models import tiny
from transformers import AutoModelForCausalLM

from mxd_convert.base_model import swap
from mxd_convert.base_model.families import Site
from mxd_convert.layers import MxD
from mxd_convert.modeling import modeling_mxd


def layer(site: Site) -> MxD:
    """Return a small MxD that fits the site of an MLP."""
    return MxD(site.d_in, site.d_hidden, site.d_out, n_experts=8, k=4, activation=site.activation, glu=site.glu)


def convert(base: Any) -> Any:
    """Convert every MLP of a base model."""
    return swap.insert_layers(base, {site.index: layer(site) for site in sites_of(base)})


@cache
def _config(family: str, side: str) -> Any:
    more = {"hidden_size": 64} if family == "gpt_neox" else {}  # a quarter of each of its heads takes part in rotary embeddings
    config = tiny(family, vocab_size=99, pad_token_id=0, bos_token_id=1, eos_token_id=2, **more)
    torch.manual_seed(0)
    return config if side == "control" else convert(AutoModelForCausalLM.from_config(config)).config


def small_config(family: str, side: str) -> Any:
    """Make a config that no model has had yet, as tests change what they get."""
    config = _config(family, side)
    return type(config).from_dict(copy.deepcopy(config.to_dict()))


def classes(family: str, side: str) -> tuple[type, type]:
    """(model without head, causal LM)."""
    causal = getattr(modeling_mxd, f"Mxd{FAMILIES[family]}ForCausalLM")
    headless = getattr(modeling_mxd, f"Mxd{FAMILIES[family]}Model")
    return (headless, causal) if side == "ours" else (headless.base_class, causal.base_class)
