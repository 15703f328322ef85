"""Converted models made in memory by surgery: mixtures that change the logits, and exact replacements of MLPs."""

import torch
from conformance import constant_gain_layer

from mxd_convert.base_model import swap
from mxd_convert.base_model.families import find_sites
from mxd_convert.layers.trainable import trainable_class


def sites_of(base):
    return find_sites(base, base.config, range(base.config.num_hidden_layers))


def mixture_of(base, n_experts=24):
    """Replace every MLP by an MxD with the MLP's hidden units and random experts, which changes the logits."""
    torch.manual_seed(1)
    layers = {site.index: constant_gain_layer(base, site, n_experts=n_experts) for site in sites_of(base)}
    for layer in layers.values():
        torch.nn.init.normal_(layer.gate.weight)
        torch.nn.init.zeros_(layer.gate.bias)
        torch.nn.init.normal_(layer.experts, std=0.5)
    return swap.insert_layers(base, layers)


def twin_of(base):
    """Replace every MLP by a dense twin with the MLP's weights, which keeps the logits."""
    return swap.insert_layers(base, {site.index: exact_twin(base, site) for site in sites_of(base)})


def exact_twin(base, site):
    exact = constant_gain_layer(base, site).state_dict()
    twin = trainable_class("dense_twin")(site.d_in, site.d_hidden, site.d_out, activation=site.activation, glu=site.glu)
    twin.load_state_dict({name: exact[name] for name in twin.state_dict()})
    return twin
