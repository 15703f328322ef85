"""Resolution of a recipe against its base model, from the base's config alone, before any weight is loaded."""

import importlib.util
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.activations import ACT2FN

from mxd_convert.base_model.checks import load_errors
from mxd_convert.base_model.detect import suggestion
from mxd_convert.base_model.families import Architecture, Site, architecture_of, find_sites
from mxd_convert.base_model.load import empty_model, likely_mlp, load_config, pinned, untied_tensors
from mxd_convert.base_model.remote_code import trusting
from mxd_convert.data.blocks import tokens_to_read
from mxd_convert.data.documents import local_files
from mxd_convert.errors import InputError
from mxd_convert.files import check_free_space
from mxd_convert.layers import LayerSpec
from mxd_convert.recipe.presets import joint_steps, resolve_layer, resolve_precision, resolve_train, steps_of
from mxd_convert.recipe.schema import GGUF, Recipe, layer_indices
from mxd_convert.recipe.section import is_local
from mxd_convert.training.accelerator import multiplies_bfloat16
from mxd_convert.training.warm_start import check_warm_start, fill_open_keys

GROWTH_WARNING = 3.0  # times the base's parameters


@dataclass(frozen=True)
class LayerPlan:
    """A layer to convert: its shape, and the parameters of the MLP that it replaces."""

    index: int
    shape: LayerSpec
    mlp_parameters: int

    @property
    def parameters(self) -> int:
        """Return the number of the layer's parameters."""
        return self.shape.parameters

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        shape = asdict(self.shape)
        experts = shape.pop("n_experts")
        return {
            "index": self.index,
            **shape,
            "experts": experts,
            "parameters": self.parameters,
            "mlp_parameters": self.mlp_parameters,
        }


@dataclass(frozen=True)
class Plan:
    """A resolved recipe with its layers, sizes and amount of work.

    Attributes:
        recipe: with every setting resolved.
        sites: the MLPs to replace, in the order of `layers`.
        steps: of each layer, with those of the joint stage.
        tokens: of training.
        disk_bytes: that the run needs at most.
        depth_weights: number of weights in the matrices of each decoder layer of the base.
        mlp: description of the base's MLPs: their module path and what they compute.
    """

    recipe: Recipe
    sites: list[Site]
    layers: list[LayerPlan]
    base_parameters: int
    converted_parameters: int
    steps: int
    tokens: int
    disk_bytes: int
    depth_weights: list[int]
    vocabulary: int
    mlp: str
    warnings: list[str]

    @property
    def shapes(self) -> dict[int, LayerSpec]:
        """Return the shapes by layer index."""
        return {layer.index: layer.shape for layer in self.layers}

    @property
    def joint_steps(self) -> int:
        """Return the number of steps of the joint stage, which are the last of `steps`."""
        return joint_steps(self.steps, self.recipe.train.joint)

    @property
    def output(self) -> Path:
        """Return the output folder."""
        assert self.recipe.output.dir is not None
        return Path(self.recipe.output.dir)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, with the recipe in its published form."""
        keys = (
            "base_parameters",
            "converted_parameters",
            "steps",
            "joint_steps",
            "tokens",
            "disk_bytes",
            "warnings",
        )
        return {
            "recipe": self.recipe.published(),
            "mlp": self.mlp,
            "layers": [{**layer.to_dict(), "path": site.path} for layer, site in zip(self.layers, self.sites, strict=True)],
            **{key: getattr(self, key) for key in keys},
        }


def make_plan(recipe: Recipe) -> Plan:
    """Resolve a recipe against its base model: MLPs, number of experts, settings of the preset, sizes and work.

    Reads only the base's config. Raises InputError if the recipe does not fit the model.
    """
    with trusting(recipe.base.trust_remote_code):
        return _make_plan(recipe)


def _make_plan(recipe: Recipe) -> Plan:
    _check_settings(recipe)
    native = multiplies_bfloat16("cpu" if recipe.train.device == "cpu" or not torch.cuda.is_available() else "cuda")
    recipe = resolve_precision(recipe.model_copy(update={"base": pinned(recipe.base)}), native)
    config = load_config(recipe.base)
    text = config.get_text_config()
    architecture = _architecture(recipe, config)
    try:
        indices = layer_indices(recipe.layers, text.num_hidden_layers)
    except ValueError as error:
        raise InputError(str(error)) from None
    limit = getattr(text, "max_position_embeddings", None)
    if isinstance(limit, int) and recipe.data.context > limit:
        raise InputError(
            f"data.context: {recipe.data.context} tokens exceed the base model's {limit}. Set data.context to {limit} or less."
        )
    with load_errors("its config", recipe.base.model):
        model = empty_model(config)
        sites = find_sites(model, config, indices, recipe.base.mlp)
    recipe = resolve_layer(fill_open_keys(recipe), min(site.d_hidden for site in sites))
    layers = [_plan_layer(recipe, site, model) for site in sites]
    check_warm_start(recipe.train.init, {layer.index: layer.shape for layer in layers})
    recipe = _complete(recipe, layers, _is_half(recipe, config))
    assert recipe.train.batch_tokens is not None
    step_tokens = recipe.train.batch_tokens // recipe.data.context * recipe.data.context
    steps = steps_of(recipe.data.tokens, recipe.train.batch_tokens, recipe.data.context)
    base_parameters = sum(tensor.numel() for tensor in untied_tensors(model).values())
    converted = base_parameters + sum(layer.parameters - layer.mlp_parameters for layer in layers)
    plan = Plan(
        recipe=recipe,
        sites=sites,
        layers=layers,
        base_parameters=base_parameters,
        converted_parameters=converted,
        steps=steps,
        tokens=steps * step_tokens,
        disk_bytes=0,
        depth_weights=[
            sum(
                weight.numel()
                for weight in model.get_submodule(architecture.layer.format(i=depth)).parameters()
                if weight.ndim > 1
            )
            for depth in range(text.num_hidden_layers)
        ],
        vocabulary=text.vocab_size,
        mlp=architecture.description(sites[0].activation),
        warnings=_warnings(recipe, base_parameters, converted, steps) + _slow_dtype(recipe, config, native),
    )
    tokens = tokens_to_read(recipe.data) + recipe.data.eval.tokens
    return replace(plan, disk_bytes=_weights_on_disk(plan) + 4 * tokens)


def _architecture(recipe: Recipe, config: Any) -> Architecture:
    """Return the base's architecture. For an unknown family, the error names the modules that look like its MLP."""
    try:
        return architecture_of(config, recipe.base.mlp)
    except InputError as error:
        raise InputError(f"{error}{suggestion(likely_mlp(config))}") from None


def _weights_on_disk(plan: Plan) -> int:
    """Return the bytes of checkpoint, saved states and dashboard, and those of the dense twin.

    There are two saved states, and a third while it is written. A joint stage adds its own states to the last two of the layers
    alone, the newest of which has no moments.
    """
    parameters = sum(layer.parameters for layer in plan.layers)
    a_state = (8 if plan.recipe.train.moments == "bf16" else 12) * parameters
    alone = a_state + 4 * parameters if plan.joint_steps else 0
    twin = _weights_on_disk(twin_of(plan)) if plan.recipe.train.twin else 0
    return 4 * plan.converted_parameters + 3 * a_state + alone + twin + _dashboard_on_disk(plan)


def _dashboard_on_disk(plan: Plan) -> int:
    """Return the bytes of a dashboard while it is written: 20 per token and active expert, 16 per expert and output."""
    if not plan.recipe.output.dashboard:
        return 0
    shapes = [layer.shape for layer in plan.layers]
    return sum(20 * plan.recipe.data.eval.tokens * shape.active + 16 * shape.n_experts * shape.d_out for shape in shapes)


def twin_of(plan: Plan) -> Plan:
    """Return the plan of the dense twin: the same layers with constant gain, on the same text with the same settings."""
    layers = [replace(layer, shape=layer.shape.dense_twin()) for layer in plan.layers]
    recipe = plan.recipe.model_copy(
        update={
            "layer": plan.recipe.layer.model_copy(update={"kind": "dense_twin"}),
            "train": plan.recipe.train.model_copy(update={"twin": False}),
        }
    )
    converted = plan.base_parameters + sum(layer.parameters - layer.mlp_parameters for layer in layers)
    return replace(plan, recipe=recipe, layers=layers, converted_parameters=converted)


def _check_settings(recipe: Recipe) -> None:
    """Raise InputError for settings that are wrong for any base model, before one is loaded."""
    if recipe.layer.activation is not None and recipe.layer.activation not in ACT2FN:
        raise InputError(
            f"layer.activation: {recipe.layer.activation!r} is unknown to transformers. Set it to, for example, gelu, relu or silu."
        )
    for split, text in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        for key, source in text.entries():
            if is_local(source.path):
                try:
                    local_files(source.path)
                except InputError as error:
                    raise InputError(str(error).replace("data:", f"data.{split}.{key}path:", 1)) from None
    tracker = recipe.train.tracker
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise InputError(f"train.tracker: {tracker} is not installed. Run `pip install {tracker}`, or set train.tracker: none.")
    device = recipe.train.device
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(f"train.device: {device} is not available on this machine. Set train.device to auto or cpu.")


def _plan_layer(recipe: Recipe, site: Site, model: torch.nn.Module) -> LayerPlan:
    """Return the plan of a layer. Raises InputError if its size does not fit the MLP or k exceeds its experts."""
    shape = _shape(recipe, site)
    try:
        if recipe.layer.experts == "auto":
            shape = shape.match_parameters(recipe.layer.expansion)
    except ValueError as error:
        raise InputError(f"layer {site.index}: {error}") from None
    if shape.sparsity == "l1":  # does not use k
        shape = replace(shape, k=min(shape.k, shape.n_experts))
    if shape.k > shape.n_experts:
        raise InputError(
            f"layer.k: {shape.k} exceeds the {shape.n_experts} experts of layer {site.index}. Set layer.k to {shape.n_experts} or less,"
            f" or raise {recipe.layer.size_key}."
        )
    mlp = sum(parameter.numel() for path in site.modules for parameter in model.get_submodule(path).parameters())
    return LayerPlan(site.index, shape, mlp)


def _shape(recipe: Recipe, site: Site) -> LayerSpec:
    """Return the shape of the layer at a site. With `experts: auto` it has 0 experts, to be matched to the MLP's parameters."""
    layer = recipe.layer
    hidden, experts = layer.hidden or site.d_hidden, 0 if layer.experts == "auto" else layer.experts
    linear: dict[str, Any] = {"d_hidden": 0, "activation": "relu", "glu": False}
    if layer.traits.has_linear:
        linear = {"d_hidden": hidden, "activation": layer.activation or site.activation, "glu": site.glu}
    gain: dict[str, Any] = {"n_experts": 0, "k": 0, "sparsity": "topk"}
    if layer.traits.has_experts:
        gain = {"n_experts": experts, "k": layer.k, "sparsity": layer.sparsity}
    if layer.traits.is_product:
        gain["shared_expert"] = bool(layer.shared_expert)
    return LayerSpec(kind=layer.kind, d_in=site.d_in, d_out=site.d_out, skip=layer.has_skip, **linear, **gain)


def _is_half(recipe: Recipe, config: Any) -> bool:
    """Return whether the base runs in float16."""
    return recipe.base.dtype == "float16" or (recipe.base.dtype == "auto" and config.dtype == torch.float16)


def _complete(recipe: Recipe, layers: list[LayerPlan], half: bool) -> Recipe:
    """Return the recipe with the preset's settings and the output folder filled in."""
    check_gradients(recipe, half)
    experts = min(layer.shape.n_experts for layer in layers)
    recipe = resolve_train(recipe, min(layer.shape.d_in for layer in layers), experts, half)
    if experts and recipe.layer.sparsity == "topk" and (recipe.train.k_init or 0) > experts:
        raise InputError(
            f"train.k_init: {recipe.train.k_init} exceeds the {experts} experts. Set train.k_init to {experts} or less."
        )
    if recipe.output.dir is None:
        folder = Path.cwd() / "runs" / f"{recipe.base.name.removesuffix(GGUF).split('/')[-1]}-mxd"
        recipe = recipe.model_copy(update={"output": recipe.output.model_copy(update={"dir": str(folder)})})
    return recipe


def _warnings(recipe: Recipe, base: int, converted: int, steps: int) -> list[str]:
    """Return warnings about a large model and about a warm-up that is too long. base, converted: numbers of parameters."""
    found = []
    if converted > GROWTH_WARNING * base:
        smaller = max(1, int(recipe.layer.size * (GROWTH_WARNING - 1) * base / max(converted - base, 1)))
        times = f"{converted / base:.1f} times the base's parameters"
        found.append(
            f"the converted model has {times}. Set {recipe.layer.size_key} to {smaller} for at most about {GROWTH_WARNING:g} times"
        )
    warmup = recipe.train.warmup_steps or 0
    joint = joint_steps(steps, recipe.train.joint)
    if warmup > steps - joint:
        before = f" before the {joint} of the joint stage" if joint else ""
        found.append(
            f"train.warmup_steps: {warmup} exceeds the {steps - joint} training steps{before}, so the learning rate never reaches its peak"
        )
    return found


def _slow_dtype(recipe: Recipe, config: Any, native: bool) -> list[str]:
    """Return a warning about a base in half precision on a device that emulates it. config: of the base."""
    dtype = str(config.dtype).removeprefix("torch.") if recipe.base.dtype == "auto" else recipe.base.dtype
    if native or dtype not in ("bfloat16", "float16"):
        return []
    return [
        f"base.dtype: {recipe.base.dtype}: this machine emulates {dtype}, which takes many times as long as float32. Set base.dtype:"
        " float32, or train.precision: auto"
    ]


def check_gradients(recipe: Recipe, half: bool) -> None:
    """Raise InputError for a joint stage in a base that runs in float16."""
    if half and recipe.train.joint:
        raise InputError(
            f"train.joint: {recipe.train.joint:g}: gradients through a base in float16 underflow. Set base.dtype: float32 or bfloat16,"
            " or train.joint: 0."
        )


def check_processes(plan: Plan, processes: int) -> None:
    """Raise InputError if a batch has fewer blocks than there are processes."""
    train = plan.recipe.train
    assert train.batch_tokens is not None
    rows = train.batch_tokens // plan.recipe.data.context
    if (train.distribute == "data" or plan.joint_steps) and rows < processes:
        alone = "" if train.distribute == "data" else ", or set train.joint: 0, so that each process trains only its own layers"
        raise InputError(
            f"train.batch_tokens: {train.batch_tokens} tokens are {rows} blocks of {plan.recipe.data.context}, fewer than the"
            f" {processes} processes. Raise train.batch_tokens to {processes * plan.recipe.data.context} or more{alone}."
        )


def check_space(plan: Plan) -> None:
    """Raise InputError if the disk of the output folder has too little free space for the run."""
    check_free_space(plan.output, plan.disk_bytes, f"output.dir: {plan.output}: the run", " or choose another output.dir")
