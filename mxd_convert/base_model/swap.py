"""Replacement of MLPs by layers and back (revert), and temporary replacement by other modules for measurements."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import initialization

from mxd_convert.base_model.checks import quiet
from mxd_convert.base_model.families import Site, architecture_of, kept_mlp
from mxd_convert.base_model.load import untied_tensors
from mxd_convert.base_model.remote_code import has_own_code, joined
from mxd_convert.errors import InputError
from mxd_convert.modeling import layers_mxd, modeling_mxd
from mxd_convert.modeling.configuration_mxd import format_version, mlp_paths

_NOT_CARRIED = ("model_type", "architectures", "auto_map", "transformers_version", "mxd")


def insert_layers(base: Any, layers: Mapping[int, layers_mxd.FactoredLayer], origin: dict[str, Any] | None = None) -> Any:
    """Return the converted model of `base` with the given layers instead of its MLPs. `base` is not changed.

    All other tensors are the base's own. The layers' parameters are cast to the base's dtype.

    Args:
        base: The base model.
        layers: The trained layers by layer index.
        origin: A record for config.json: the base's model id, revision, tensor hash, and the recipe's `base.mlp` if it has one.
    """
    row = architecture_of(base.config, kept_mlp(origin))
    dropout = float(getattr(base.config.get_text_config(), row.dropout)) if row.dropout is not None else 0.0
    entries = {str(index): {**layers[index].entry(), "dropout": dropout} for index in sorted(layers)}
    mxd: dict[str, Any] = {"format_version": format_version(row.bypassed, entries), "mlp": row.path}
    mxd |= {"then": list(row.bypassed)} if row.bypassed else {}
    mxd |= {"flat": row.flat} if row.flat else {}
    mxd |= {"layers": entries, **({"base": origin} if origin else {})}
    model_class = _counterpart(base)
    config = model_class.config_class(**{**_carried(base), "mxd": mxd})
    tensors = untied_tensors(base)
    for index, layer in layers.items():
        path = row.path.format(i=index)
        tensors = _without(tensors, mlp_paths(mxd, index))
        parameters = dict(layer.named_parameters())  # only these are cast: buffers of an activation may need another dtype
        state = layer.state_dict()
        tensors |= {f"{path}.{name}": state[name].to(base.dtype) if name in parameters else state[name] for name in state}
    return model_of_tensors(model_class, config, tensors, base)


def _counterpart(base: Any) -> Any:
    """Return the class of a base's converted model."""
    if has_own_code(base):
        return joined(base)
    return getattr(modeling_mxd, f"Mxd{type(base.config).__name__.removesuffix('Config')}ForCausalLM")


def check_converted(index: int, layers: Iterable[Any], option: str = "") -> None:
    """Raise InputError if a layer is not among the converted `layers`. option: the option that named it, such as `--layers: `."""
    converted = [str(layer) for layer in layers]
    if str(index) not in converted:
        raise InputError(f"{option}layer {index} is not converted. Converted layers: {', '.join(converted)}.")


def remove_layers(converted: Any, base: Any, indices: list[int]) -> Any:
    """Return a converted model with the original MLPs in the given layers, of the base's own class if no converted layer is left.

    Raises InputError if a layer is not converted or the base's MLP does not fit.
    """
    mxd = converted.config.mxd
    for index in indices:
        check_converted(index, mxd["layers"])
    left = {index: layer for index, layer in mxd["layers"].items() if int(index) not in indices}
    tensors, originals = untied_tensors(converted), untied_tensors(base)
    for index in indices:
        paths = mlp_paths(mxd, index)
        tensors = _without(tensors, paths)
        tensors |= {name: tensor.to(converted.dtype) for name, tensor in originals.items() if name.startswith(paths)}
    if left:
        by_hand = {
            key: [order for order in mxd[key] if order["layer"] not in indices] for key in ("edits", "steering") if key in mxd
        }
        config = type(converted.config)(**_carried(converted), mxd={**mxd, **by_hand, "layers": left})
        return model_of_tensors(type(converted), config, tensors, converted)
    base_class = converted.base_class
    config = base_class.config_class(**_carried(converted))
    for one, auto_class in ((base_class, "AutoModelForCausalLM"), (base_class.config_class, "AutoConfig")):
        if not one.__module__.startswith("transformers."):
            one.register_for_auto_class(auto_class)  # save_pretrained then copies the custom code
    return model_of_tensors(base_class, config, tensors, converted)


def _carried(model: Any) -> dict[str, Any]:
    """Return the settings of a model's config that the new config keeps."""
    settings = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_CARRIED}
    if settings.get("tie_word_embeddings") and not model.all_tied_weights_keys:
        settings["tie_word_embeddings"] = False  # transformers found two different matrices in the files and left them untied
    return settings


def _without(tensors: dict[str, Tensor], paths: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(paths)}


def model_of_tensors(model_class: Any, config: Any, tensors: dict[str, Tensor], like: Any) -> Any:
    """Return a model of `model_class` with the given tensors (not copied), and the dtype and generation settings of `like`."""
    with initialization.no_init_weights(), quiet():
        model = model_class._from_config(config, dtype=like.dtype)
    tied = set(model.all_tied_weights_keys)
    missing, unexpected = model.load_state_dict(tensors, assign=True, strict=False)
    if problems := sorted((set(missing) - tied) | set(unexpected)):
        raise InputError(
            f"the weights don't fit the model: {problems[0]}" + (f" and {len(problems) - 1} more" if len(problems) > 1 else "")
        )
    model.tie_weights()
    model.generation_config = copy.deepcopy(like.generation_config)
    return model.eval().requires_grad_(False)


@contextmanager
def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Replace the modules at the given paths within the block, and restore them afterwards."""

    def put(path: str, module: nn.Module) -> nn.Module:
        parent, _, name = path.rpartition(".")
        holder = model.get_submodule(parent)
        before = getattr(holder, name)
        setattr(holder, name, module)
        return before

    before = {path: put(path, module) for path, module in modules.items()}
    try:
        yield
    finally:
        for path, module in before.items():
            put(path, module)


def replaced_mlps(model: nn.Module, sites: Sequence[Site], modules: Mapping[int, nn.Module]) -> Any:
    """Return a context in which `modules`, by layer index, replace the MLPs at the given sites."""
    return replaced(model, {path: module for site in sites for path, module in site.replacements(modules[site.index]).items()})


class Constant(nn.Module):
    """A module that returns the same vector (O) for every token, for zero and mean ablation of an MLP."""

    def __init__(self, value_O: Tensor) -> None:
        super().__init__()
        self.value_O = value_O

    def forward(self, x_BTI: Tensor) -> Tensor:
        """Return the vector for every token, (B, T, O)."""
        return self.value_O.to(x_BTI).expand(*x_BTI.shape[:-1], -1).clone()  # cloned, because some models add to it in place


def permuted_experts(layer: layers_mxd.FactoredLayer, order_N: Tensor) -> Any:
    """Return a context in which row n of `layer.experts` is row `order_N[n]`, while the gate is not permuted."""

    @contextmanager
    def context() -> Iterator[None]:
        before = layer.experts.data
        layer.experts.data = before[order_N]
        try:
            yield
        finally:
            layer.experts.data = before

    return context()


__all__ = [
    "Constant",
    "model_of_tensors",
    "check_converted",
    "insert_layers",
    "permuted_experts",
    "remove_layers",
    "replaced",
    "replaced_mlps",
]
