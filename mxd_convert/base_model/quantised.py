"""Quantised base models in transformers' own format. Their weights are dequantised as soon as they are loaded.

The layers are then trained on the activations of the weights that the quantised model computes with, gradients pass through them
in the joint stage, and the converted checkpoint is an ordinary one.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AutoHfQuantizer

from mxd_convert.base_model.checks import load_errors
from mxd_convert.errors import InputError

BY_TRANSFORMERS = ("bitsandbytes",)
# packed formats that transformers can't unpack: a linear map is read out by its values on the identity
BY_IDENTITY = ("gptq", "awq")
KNOWN = "bitsandbytes (8-bit and 4-bit), GPTQ, AWQ and GGUF"


def unquantised(config: Any, name: str) -> Any:
    """Return the config of the dequantised model, which is `config` itself if the model is not quantised.

    name: of the model. Raises InputError if the weights can't be dequantised, or a package for it is missing.
    """
    method = _method(config)
    if method is None:
        return config
    if method not in (*BY_TRANSFORMERS, *BY_IDENTITY):
        raise InputError(
            f"base.model: {name} is quantised with {method[:40]}. Layers can't be trained through its weights, because they can't be"
            f" dequantised. Give the unquantised model, or one in a known format: {KNOWN}."
        )
    with load_errors("the model", name):  # before any text is read, not when the weights are loaded
        AutoHfQuantizer.from_config(copy.deepcopy(config.quantization_config)).validate_environment()
    config = copy.deepcopy(config)
    del config.quantization_config
    return config


def dequantised(model: Any, name: str) -> Any:
    """Return a loaded quantised model with its weights dequantised, to the dtype that it computes in. name: of the model."""
    method = _method(model.config)
    with load_errors("the model", name, "dequantised"):
        if method in BY_TRANSFORMERS:
            return model.dequantize(model.dtype)
        for path, module in list(model.named_modules()):
            if hasattr(module, "qweight"):
                model.set_submodule(path, linear_of(module, model.dtype, model.device))
        model.hf_quantizer.remove_quantization_config(model)
        return model


@torch.no_grad()
def linear_of(module: Any, dtype: torch.dtype, device: torch.device) -> nn.Linear:
    """Return a linear map as an nn.Linear, from its values on the unit vectors.

    module: the map, with `in_features`, `out_features` and `bias` (None without one).
    """
    size = module.in_features
    bias_O = module(torch.zeros(1, size, dtype=dtype, device=device))[0]
    # few unit vectors at a time, because some kernels compute large batches in another way
    rows = [module(unit_BI) - bias_O for unit_BI in torch.eye(size, dtype=dtype, device=device).split(256)]
    linear = nn.Linear(size, module.out_features, bias=module.bias is not None, dtype=dtype, device=device)
    linear.weight.copy_(torch.cat(rows).T)
    if module.bias is not None:
        linear.bias.copy_(bias_O)
    return linear


def _method(config: Any) -> str | None:
    """Return the name of the quantisation, or None if the model is not quantised."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = (settings if isinstance(settings, dict) else settings.to_dict()).get("quant_method", "an unknown method")
    return str(getattr(method, "value", method))


__all__ = ["dequantised", "linear_of", "unquantised"]
