"""Detection of the MLP in a model of an unsupported family, by the widths and names of its projections."""

import re
from typing import Any

from torch import nn
from transformers.activations import ACT2FN

from mxd_convert.errors import InputError
from mxd_convert.recipe.schema import Mlp


def widths_of(projection: nn.Module, path: str) -> tuple[int, int]:
    """Return the (input, output) width of a Linear or of GPT-2's Conv1D, whose weight is transposed.

    Raises InputError if the module has no matrix as its weight.
    """
    weight = getattr(projection, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        raise InputError(f"{path} is a {type(projection).__name__}; expected a linear projection. Name one in base.mlp.")
    rows, columns = weight.shape
    return (rows, columns) if type(projection).__name__ == "Conv1D" else (columns, rows)


def suggestion(found: Mlp | None) -> str:
    """Return the result of `guess` as a sentence for an error message, or "" if it is None."""
    if found is None:
        return ""
    content = {"module": f'"{found.module}"', **found.model_dump(exclude={"module"}, exclude_defaults=True)}
    listed = ", ".join(f"{key}: {value}" for key, value in content.items()).replace("'", "")
    return f" This looks like its MLP: base.mlp: {{{listed}}}"


_NOT_TEXT = r"vision|visual|image|audio"  # in the paths of towers for other inputs
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")  # config keys of the activation


def guess(model: nn.Module, config: Any) -> Mlp | None:
    """Return the likely `base.mlp` of a recipe for an unsupported family, or None if no module looks like a plain MLP.

    The decision uses the widths and names of projections. The model's weights may be on the meta device.
    """
    names = (getattr(config.get_text_config(), key, None) for key in _ACTIVATIONS)
    activation = next((name for name in names if isinstance(name, str) and name in ACT2FN), None)
    for path, module in model.named_modules():
        in_text = re.search(r"\.0(\.|$)", path) and not re.search(_NOT_TEXT, path)
        projections = _projections(module) if in_text else None
        if projections is None or activation is None:
            continue
        up, gate, down = projections
        template = re.sub(r"\.0(\.|$)", r".{i}\1", path, count=1)
        chain = []
        if template.endswith("{i}"):  # the projections are in the decoder layer itself
            between = [name for name, child in module.named_children() if isinstance(child, tuple(_activation_classes()))]
            chain = [up, *between, down]
        layers = model.get_submodule(template[: template.index(".{i}")].rpartition(".")[0])
        norms = [name for name, child in layers.named_children() if type(child).__name__.endswith("Norm")]
        norm = f"{template[: template.index('.{i}')].rpartition('.')[0]}.{norms[-1]}" if norms else None
        return Mlp(module=template, up=up, gate=gate, down=down, activation=activation, chain=chain, norm=norm)
    return None


def _activation_classes() -> set[type]:
    return {type(ACT2FN[name]) for name in ACT2FN}


def _projections(module: nn.Module) -> tuple[str, str | None, str] | None:
    """Return the names (up, gate, down) if the module has exactly the projections of an MLP, else None."""
    children = {name: _in_and_out(child) for name, child in module.named_children()}
    linear = {child: widths for child, widths in children.items() if widths is not None}
    for down, (hidden, width) in linear.items():
        ups = [child for child in linear if child != down]
        if hidden <= width or not 1 <= len(ups) <= 2 or any(linear[up][0] != width for up in ups):
            continue
        made = {linear[up][1] for up in ups}
        if len(ups) == 2 and made == {hidden}:
            gate = next((child for child in ups if re.search(r"gate|w1$", child)), ups[0])
            return next(child for child in ups if child != gate), gate, down
        if len(ups) == 1 and made <= {hidden, 2 * hidden}:
            return ups[0], ups[0] if made == {2 * hidden} else None, down
    return None


def _in_and_out(module: nn.Module) -> tuple[int, int] | None:
    try:
        return widths_of(module, "")
    except InputError:
        return None
