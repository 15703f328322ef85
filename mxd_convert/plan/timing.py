"""A short measurement of this machine that predicts the duration of a run.

Time doesn't depend on the values of weights, so none are loaded. A layer of each shape takes a few steps on random activations,
and the base's forward is timed with one and three decoder layers of constant weights.
"""

import copy
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mxd_convert.base_model.load import empty_model, load_config
from mxd_convert.evaluation.fidelity import PERMUTATIONS, VARIANT_PASSES, rows_a_batch
from mxd_convert.layers import LayerSpec
from mxd_convert.plan.flops import joint_forwards
from mxd_convert.plan.memory import budget, device_of, groups
from mxd_convert.plan.resolve import LayerPlan, Plan
from mxd_convert.training.allocator import kept_memory
from mxd_convert.training.balance import balances_of
from mxd_convert.training.derivatives import EVERY, Moved
from mxd_convert.training.layer_step import forward_backward
from mxd_convert.training.optimiser import Optimiser
from mxd_convert.training.stage import make_layer
from mxd_convert.training.window import Window

INIT_TOKENS = 2  # per expert, that initialisation from tokens reads in most layers
MAX_FLOPS = 3e11  # of a timed step; larger ones are timed on fewer tokens and extrapolated
TIMED_LAYERS = 3  # of the base, at most
STARTUP_SECONDS = 12.0  # for imports, loading, hashing, saving and plots


@dataclass(frozen=True)
class MachineTiming:
    """Predicted times of a run on this machine: seconds per training step in base and layers, tokens per second, and totals."""

    base_step_seconds: float
    layers_step_seconds: float
    tokens_per_second: float
    training_seconds: float
    evaluation_seconds: float

    @property
    def seconds(self) -> float:
        """Return the duration of the whole run."""
        return STARTUP_SECONDS + self.training_seconds + self.evaluation_seconds


def measure_machine(plan: Plan) -> MachineTiming:
    """Predict the times of a run in one process from a measurement of a few seconds."""
    with kept_memory():
        return _measure(plan)


def _measure(plan: Plan) -> MachineTiming:
    passes = groups(plan, [layer.index for layer in plan.layers], budget(plan.recipe))
    device = torch.device(device_of(plan.recipe))
    step_tokens = plan.tokens // plan.steps
    a_layer, head = _forward_seconds(plan, device, plan.recipe.base.dtype, min(step_tokens, 2048) // plan.recipe.data.context)
    teacher = plan.recipe.train.target == "teacher"
    depths = sum(max(group) + 1 for group in passes) + (sum(max(group) + 1 for group in passes[1:]) if teacher else 0)
    moving = 1 / EVERY if plan.recipe.train.jacobian else 0.0  # share of the tokens that take a step, in a layer and in its MLP
    base = a_layer * (depths + moving * len(plan.layers)) * step_tokens
    alike: dict[LayerSpec, tuple[float, float]] = {}
    learning = evaluating = 0.0
    for layer in plan.layers:
        shape = layer.shape
        if shape not in alike:
            alike[shape] = _layer_seconds(plan, layer, step_tokens, device)
        learning, evaluating = learning + alike[shape][0], evaluating + alike[shape][1]
    read = INIT_TOKENS * max(shape.n_experts for shape in alike) if plan.recipe.train.init == "tokens" else 0
    compared = sum(alike[layer.shape][1] for layer in plan.layers) / 2  # with half of the experts on average
    initialising = read * (a_layer * depths + compared)
    depth = int(load_config(plan.recipe.base).get_text_config().num_hidden_layers)
    whole = a_layer * depth + head
    joint = plan.joint_steps
    joint_step = joint_forwards(plan) * whole * step_tokens if joint else 0.0
    seconds = initialising + (plan.steps - joint) * (base + learning) + joint * (joint_step + learning / (1 + moving))
    return MachineTiming(base, learning, plan.tokens / seconds, seconds, _evaluation_seconds(plan, device, depth, evaluating))


def _evaluation_seconds(plan: Plan, device: torch.device, depth: int, evaluating: float) -> float:
    """Return the seconds of the evaluation. depth: of the base, in decoder layers. evaluating: seconds per token of all layers' forwards."""
    copies = 3 + PERMUTATIONS  # of a batch, for the variants of a layer
    rows = copies * rows_a_batch(plan.recipe.data.context, plan.vocabulary)
    a_layer, head = _forward_seconds(plan, device, "float32", rows)
    whole = a_layer * depth + head
    # every variant of a layer starts at the layer, and runs on a share of the text that costs VARIANT_PASSES forwards at most
    suffixes = sum(copies * (a_layer * (depth - layer.index) + head) / whole for layer in plan.layers)
    share = min(1.0, VARIANT_PASSES / suffixes)
    # forwards: the base, the converted model, two ablations and the dense twin, and the base again on the variants' tokens; each layer's
    # work: in the converted model, and three times as much for its statistics; in the variants, and in two directions of the Jacobian
    ablations = 0 if len(plan.layers) == 1 and share == 1.0 else 2  # else among the variants
    forwards = 2 + ablations + plan.recipe.train.twin + share * (1 + suffixes)
    return (forwards * whole + (4 + share * (PERMUTATIONS + 5)) * evaluating) * plan.recipe.data.eval.tokens


def _forward_seconds(plan: Plan, device: torch.device, dtype: str, rows: int) -> tuple[float, float]:
    """Return seconds per token of one decoder layer of the base in a dtype, and of embedding and head together, on `rows` blocks."""
    config = load_config(plan.recipe.base)
    ids_BT = torch.randint(0, plan.vocabulary, (max(1, rows), plan.recipe.data.context), device=device)
    depths = sorted({1, min(TIMED_LAYERS, config.get_text_config().num_hidden_layers)})
    stacks, whole = [], 0.0
    for depth in depths:
        model = _shallow(config, depth, dtype).to_empty(device=device)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.fill_(0.01)
            # without the head, which takes longer than the layers here, and would hide them in its noise
            stacks.append(_seconds(functools.partial(model.base_model, input_ids=ids_BT, use_cache=False), device))
            if depth == 1:
                whole = _seconds(functools.partial(model, input_ids=ids_BT, use_cache=False), device)
        del model
    alone = stacks[0]
    a_layer = max((stacks[-1] - alone) / (depths[-1] - 1), 0.2 * alone) if len(depths) > 1 else alone
    return a_layer / ids_BT.numel(), max(0.0, whole - a_layer) / ids_BT.numel()


def _shallow(config: Any, depth: int, dtype: str) -> Any:
    """Return the base model with `depth` decoder layers and no memory for its weights."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    model = empty_model(config).eval()
    return model if dtype == "auto" else model.to(getattr(torch, dtype))


def _layer_seconds(plan: Plan, layer: LayerPlan, step_tokens: int, device: torch.device) -> tuple[float, float]:
    """Return seconds of a layer's training step, and seconds per token of its forward in a checkpoint."""
    recipe = plan.recipe
    module = make_layer(layer.shape, recipe.train.seed, layer.index, recipe.train.init).to(device)
    optimiser = Optimiser({layer.index: module}, 1e-6, 10**6, 1, "constant", moments=recipe.train.moments)
    window = Window.empty(module, device)
    tokens = max(64, min(step_tokens, int(MAX_FLOPS // (6 * layer.parameters))))

    def step_of(count: int) -> Callable[[], None]:
        x_BI, y_BO = (torch.randn(count, width, device=device) for width in (layer.shape.d_in, layer.shape.d_out))
        counted_B = torch.ones(count, dtype=torch.bool, device=device)
        moved = None
        if recipe.train.jacobian:
            rows_S = torch.arange(0, count, EVERY, device=device)
            moved = Moved(rows_S, x_BI[rows_S], y_BO[rows_S])
        balances = balances_of({0: module}, recipe.train.balance or 0.0, lambda sums: sums, device)
        balance = (balances[0], counted_B) if balances else None

        def step() -> None:
            train, terms = recipe.train, (recipe.train.jacobian or 0.0, moved, balance)
            forward_backward(module, x_BI, y_BO, counted_B, train.precision, recipe.layer.l1, None, window, *terms)
            optimiser.step(1)

        return step

    if module.n_experts:  # the mean over the run
        module.k = layer.shape.k + ((recipe.train.k_init or layer.shape.k) - layer.shape.k) // 4
    seconds = _seconds(step_of(tokens), device)
    if tokens < step_tokens:  # the optimiser's time does not depend on the number of tokens
        half = _seconds(step_of(tokens // 2), device)
        a_token = max(seconds - half, 0.1 * seconds) / (tokens - tokens // 2)
        seconds += a_token * (step_tokens - tokens)
    if module.n_experts:
        module.k = layer.shape.k
    x_BI = torch.randn(min(tokens, 512), layer.shape.d_in, device=device)
    with torch.no_grad():
        forward = _seconds(lambda: module(x_BI), device) / len(x_BI)
    return seconds, forward


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of three calls, after one that is not counted."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[1]
