"""Memory of a conversion: the estimate, the groups of layers that fit together, and whether the run fits at all.

All figures are bytes of one process, on a GPU of the device's memory. benchmarks/memory.py compares them with real runs.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from mxd_convert.errors import InputError
from mxd_convert.evaluation.fidelity import rows_a_batch
from mxd_convert.evaluation.variance import MAX_GROUPS
from mxd_convert.layers.sparse_ops.autograd import rows_a_chunk
from mxd_convert.plan.resolve import LayerPlan, Plan, twin_of
from mxd_convert.recipe.schema import Recipe
from mxd_convert.training.derivatives import EVERY
from mxd_convert.training.joint import piece_tokens
from mxd_convert.training.joint_loss import chunk_tokens
from mxd_convert.training.optimiser import GPU_CHUNK_ELEMENTS
from mxd_convert.training.stream import FORWARD_TOKENS, buffer_steps

LIBRARIES = 520 * 2**20  # bytes of torch, transformers and their dependencies, resident in a CPU process after a forward
BASE_SHARE = 0.5  # of the available memory, for the base model; a larger one is spread over device, memory and disk
SPARE = 1.1  # factor for allocator overhead
USABLE = 0.9  # of the free memory: the rest is for what the estimate leaves out
_WIDTHS = {"bfloat16": 2, "float16": 2}  # bytes per element; others take 4


@dataclass(frozen=True)
class Memory:
    """Peak memory by phase, in bytes: training of a group of layers, and evaluation of the checkpoint."""

    training: int
    evaluation: int

    @property
    def peak(self) -> int:
        """Return the larger of the two."""
        return max(self.training, self.evaluation)


def estimate(plan: Plan, group: Sequence[LayerPlan], processes: int = 1, room: int | None = None) -> Memory:
    """Return the memory of a run that trains the layers of `group` in one pass.

    processes: number of processes. room: available memory; a base model too large for it is spread. None: count the base whole.
    """
    return Memory(max(_training(plan, group, processes, room), _joint(plan, processes)), _evaluation(plan))


def base_bytes(plan: Plan) -> int:
    """Return the bytes of the base model's weights while activations are harvested."""
    return _WIDTHS.get(plan.recipe.base.dtype, 4) * plan.base_parameters


def base_room(plan: Plan, room: int) -> int | None:
    """Return the memory limit of a base model that is too large for `room` and is spread by accelerate; None if it fits."""
    most = int(BASE_SHARE * room)
    return most if base_bytes(plan) > most else None


def _held(recipe: Recipe, group: Sequence[LayerPlan], whole_gradients: bool) -> int:
    """Return the bytes of weights, moments, gradients and balance terms.

    Gate and experts have whole gradients only for L1 or shared batches.
    """
    held = 0
    for layer in group:
        rows = layer.shape.n_experts * (layer.shape.d_in + layer.shape.d_out)
        whole = layer.parameters if whole_gradients or recipe.layer.sparsity == "l1" else layer.parameters - rows
        held += layer.parameters * (4 + (4 if recipe.train.moments == "bf16" else 8)) + 4 * whole
        held += 4 * 3 * layer.shape.d_out**2 if _is_balanced(recipe, layer) else 0  # slopes and sums of covariances
    return held


def _is_balanced(recipe: Recipe, layer: LayerPlan) -> bool:
    return bool(recipe.train.balance) and layer.shape.traits.is_product


def _chunk_of_the_optimiser(recipe: Recipe, group: Sequence[LayerPlan]) -> int:
    """Return the bytes of the optimiser's largest chunk on a GPU; 0 on a CPU, where chunks are small."""
    if device_of(recipe) != "cuda":
        return 0
    rows_at_a_time = min(
        GPU_CHUNK_ELEMENTS, max(layer.shape.n_experts * max(layer.shape.d_in, layer.shape.d_out) for layer in group)
    )
    return rows_at_a_time * (20 if recipe.train.moments == "bf16" else 8)


def _joint(plan: Plan, processes: int) -> int:
    """Return the bytes of the joint stage, 0 without a joint stage."""
    recipe = plan.recipe
    if not plan.joint_steps:
        return 0
    step_tokens = plan.tokens // plan.steps // processes
    tokens = min(step_tokens, max(piece_tokens(device_of(recipe)), recipe.data.context))
    width = _WIDTHS.get(recipe.base.dtype, 4)
    kept = sum(4 * tokens * ((6 if s.glu else 4) * s.d_hidden + 10 * s.d_out + 2 * s.d_in) for s in plan.shapes.values())
    widest = max(plan.sites, key=lambda site: site.d_hidden)
    base = width * tokens * len(plan.depth_weights) * (20 * widest.d_in + 2 * widest.d_hidden)
    logits = 6 * 4 * min(tokens, chunk_tokens(device_of(recipe), plan.vocabulary)) * plan.vocabulary
    logits += 3 * width * tokens * max(site.d_out for site in plan.sites)  # hidden states of both models, and a gradient
    # kept over a whole step to compute the gradients of gate and experts
    sources = 4 * step_tokens * sum(shape.d_in + shape.d_out + 6 * shape.active for shape in plan.shapes.values())
    held = _held(recipe, plan.layers, processes > 1) + _chunk_of_the_optimiser(recipe, plan.layers)
    most_experts = max(shape.n_experts for shape in plan.shapes.values())
    kept += 4 * most_experts * min(tokens, rows_a_chunk(device_of(recipe), 4 * most_experts)) if most_experts else 0
    return _libraries(recipe) + base_bytes(plan) + int(SPARE * (held + sources + kept + base + logits))


def _training(plan: Plan, group: Sequence[LayerPlan], processes: int, room: int | None) -> int:
    """Return the bytes of a pass that trains the layers of `group`."""
    recipe = plan.recipe
    together = processes > 1 and recipe.train.distribute == "data"
    step_tokens = plan.tokens // plan.steps
    tokens = step_tokens // (processes if together else 1)
    width = _WIDTHS.get(recipe.base.dtype, 4)
    held = _held(recipe, group, together)
    if recipe.train.order == "sequential":  # trained layers below stay in memory, in the base's precision
        held += width * sum(layer.parameters for layer in plan.layers if layer.index < group[0].index)
    held += _chunk_of_the_optimiser(recipe, group)
    steps = min(plan.steps, buffer_steps(step_tokens, plan.sites))
    a_token = width * sum(layer.shape.d_in + layer.shape.d_out for layer in group)
    buffer = (steps + 1) * tokens * a_token  # one step more while it is harvested
    # tokens that take a step: every layer keeps their inputs after it, and the changes of the MLP's output
    moved = tokens // EVERY if recipe.train.jacobian else 0
    step = max(_step(recipe, layer, tokens + moved) for layer in group)
    step += 4 * moved * sum(layer.shape.d_in + layer.shape.d_out for layer in group)
    widest = max(plan.sites, key=lambda site: site.d_hidden)  # the base's hidden width, not the layers'
    a_forward = width * (6 * widest.d_hidden + 12 * widest.d_in)  # per token
    context = recipe.data.context  # a forward takes at least one block
    forward = max(context, min(tokens, FORWARD_TOKENS)) * a_forward
    initialisation = 0
    if recipe.train.init == "tokens":  # activations of all layers; in float32 an eighth of them, and the rest of one layer twice
        read = max(context, FORWARD_TOKENS)  # for any batch size
        widths = [layer.shape.d_in + layer.shape.d_out for layer in group]
        initialisation = read * (max(a_forward, sum(widths) // 2 + 7 * max(widths)) + a_token)
        # sums in float64 for the fit of the skip paths
        initialisation += sum(8 * s.d_in * (s.d_in + s.d_out) for s in (layer.shape for layer in group) if s.skip)
    base = base_bytes(plan) if room is None else base_room(plan, room) or base_bytes(plan)
    return _libraries(recipe) + base + int(SPARE * (held + max(initialisation, buffer + max(step, forward))))


def _libraries(recipe: Recipe) -> int:
    """Return the bytes of the libraries, which take none of a GPU's memory."""
    return LIBRARIES if device_of(recipe) == "cpu" else 0


def _step(recipe: Recipe, layer: LayerPlan, tokens: int) -> int:
    """Return the peak of intermediate tensors in one layer's forward and backward."""
    hidden = 4 * tokens * (6 if layer.shape.glu else 4) * layer.shape.d_hidden
    balance = _is_balanced(recipe, layer)
    factors = 12 if balance else 0  # centred and weighted, for the balance term
    outputs = 4 * tokens * ((10 + factors) * layer.shape.d_out + 2 * layer.shape.d_in)
    outputs += 4 * 8 * layer.shape.d_out**2 if balance else 0  # covariances, and what their slopes are computed from
    gates = tokens if recipe.layer.sparsity == "l1" else min(tokens, rows_a_chunk(device_of(recipe), 4 * layer.shape.n_experts))
    return hidden + outputs + 4 * gates * layer.shape.n_experts * (3 if recipe.layer.sparsity == "l1" else 1)


def _evaluation(plan: Plan) -> int:
    """Return the bytes of an evaluation with base and converted model in float32."""
    context = plan.recipe.data.context
    tokens = context * rows_a_batch(context, plan.vocabulary)
    widest = max(plan.layers, key=lambda layer: layer.shape.n_experts)
    models = 4 * plan.base_parameters + 4 * plan.converted_parameters + 4 * sum(layer.parameters for layer in plan.layers)
    if plan.recipe.train.twin:
        models += 4 * twin_of(plan).converted_parameters
    a_token = (
        10 * 4 * plan.vocabulary + 2 * 4 * widest.shape.n_experts + 20 * 8 * widest.shape.d_out + 4 * 4 * widest.shape.d_hidden
    )
    # of every layer: inputs and outputs in both models, and the hidden states that the variants start from
    a_token += 4 * sum(3 * layer.shape.d_in + 2 * layer.shape.d_out for layer in plan.layers)
    sums = 8 * sum(4 * MAX_GROUPS * layer.shape.d_out + layer.shape.n_experts for layer in plan.layers)
    sums += 4 * sum(layer.shape.n_experts * layer.shape.d_out for layer in plan.layers)  # of attribution
    return _libraries(plan.recipe) + models + tokens * a_token + sums


def device_of(recipe: Recipe) -> str:
    """Return the device on which a recipe's layers are trained: cpu or cuda."""
    return "cpu" if recipe.train.device == "cpu" or not torch.cuda.is_available() else "cuda"


def available(device: str) -> int:
    """Return the bytes a run may take: free on the GPU, or free on the machine within the limit of the control group."""
    if device == "cuda":
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # cached by torch, which reuses it
        return torch.cuda.mem_get_info()[0] + kept
    free = psutil.virtual_memory().available
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit is not None and used is not None:
        free = min(free, max(0, limit - used + _reclaimable()))
    return free + psutil.Process(os.getpid()).memory_info().rss  # the estimate counts this process's memory too


def _cgroup(name: str) -> int | None:
    """Return a figure of the control group in bytes, or None if there is no limit or no control group."""
    try:
        return int(Path("/sys/fs/cgroup", name).read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _reclaimable() -> int:
    """Return the bytes of file pages in the control group's usage, which the system frees on demand."""
    try:
        lines = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
    except OSError:
        return 0
    counts = dict(line.split() for line in lines)
    return sum(int(counts.get(name, 0)) for name in ("inactive_file", "active_file"))


def budget(recipe: Recipe) -> int:
    """Return the memory budget of a pass: most of the free memory of this process, at most `train.memory_gib`."""
    device, neighbours = device_of(recipe), 1
    if device == "cpu":
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes on this machine, set by torchrun
    free = int(USABLE * available(device)) // neighbours
    return free if recipe.train.memory_gib is None else min(free, int(recipe.train.memory_gib * 2**30))


def groups(plan: Plan, indices: Sequence[int], room: int, processes: int = 1) -> list[list[int]]:
    """Return the layers in groups that fit into `room` bytes, with at least one layer each; in sequential order always one."""
    layers = {layer.index: layer for layer in plan.layers}
    found: list[list[int]] = []
    for index in indices:
        joined = [*found[-1], index] if found else [index]
        fits = _training(plan, [layers[member] for member in joined], processes, room) <= room
        if found and fits and plan.recipe.train.order == "parallel":
            found[-1] = joined
        else:
            found.append([index])
    return found


def fitting_together(plans: Sequence[Plan], room: int) -> list[list[int]]:
    """Return groups of runs that fit into `room` bytes together, by their number. All runs have the same base and text.

    A run whose layers don't all fit has a group of its own.
    """
    found: list[list[int]] = []
    used = 0
    for number, plan in enumerate(plans):
        shared = _libraries(plan.recipe) + base_bytes(plan)
        alone = _training(plan, plan.layers, 1, room)
        if found and alone <= room and used + alone - shared <= room:
            found[-1].append(number)
            used += alone - shared
        else:
            found.append([number])
            used = alone
    return found


def shares(plan: Plan, processes: int) -> list[list[int]]:
    """Return the layer indices of each process: consecutive layers of about equal size, or all layers if batches are shared."""
    indices = [layer.index for layer in plan.layers]
    if plan.recipe.train.distribute == "data" or processes == 1:
        return [indices] * processes
    total, done = sum(layer.parameters for layer in plan.layers), 0
    found: list[list[int]] = [[] for _ in range(processes)]
    for layer in plan.layers:
        found[min(processes - 1, (done + layer.parameters // 2) * processes // total)].append(layer.index)
        done += layer.parameters
    return found


def largest_group(plan: Plan, processes: int = 1) -> list[LayerPlan]:
    """Return the layers of the pass that takes the most memory."""
    layers = {layer.index: layer for layer in plan.layers}
    found = groups(plan, list(layers), budget(plan.recipe), processes)
    return max(([layers[index] for index in group] for group in found), key=lambda group: _training(plan, group, processes, None))


def fits_for_evaluation(plan: Plan, device: str) -> bool:
    """Return whether base and converted model fit on a device for evaluation."""
    return _evaluation(plan) <= USABLE * available(device)


def check_joint(plan: Plan, room: int) -> None:
    """Raise InputError for a joint stage in a base model that must be spread over devices."""
    if plan.joint_steps and base_room(plan, room) is not None:
        raise InputError(
            f"train.joint: {plan.recipe.train.joint:g}: the base model takes {base_bytes(plan) / 2**30:.1f} GiB, more than half of the"
            f" {room / 2**30:.1f} GiB available. It would be spread over device, memory and disk, where the joint stage can't train."
            " Set train.joint: 0."
        )


def check_memory(plan: Plan, processes: int = 1, begun: bool = False) -> None:
    """Raise InputError if not even one layer at a time fits. begun: whether the run has a saved state to resume from."""
    # of equal layers the last: in sequential order it has all others below it
    worst = max(plan.layers, key=lambda layer: (layer.parameters, layer.index))
    room = budget(plan.recipe)
    need = Memory(_training(plan, [worst], processes, room), _evaluation(plan))
    gib, layer = plan.recipe.train.memory_gib, plan.recipe.layer
    set_lower = gib is not None and int(gib * 2**30) <= room
    have = f"train.memory_gib: {gib:g} GiB" if set_lower else f"memory: {room / 2**30:.1f} GiB usable"
    more = ", set train.moments: bf16" if plan.recipe.train.moments == "fp32" else ""
    more += ", or raise train.memory_gib." if set_lower else "."
    if begun:
        more += f" The unfinished run resumes only with more memory{' or fewer processes' if processes > 1 else ''}. Otherwise add --fresh."
    if need.training > room:
        raise InputError(
            f"{have}, but layer {worst.index} alone needs about {need.training / 2**30:.1f} GiB. Lower {layer.size_key}"
            f" ({layer.size}) or train.batch_tokens ({plan.recipe.train.batch_tokens}){more}"
        )
    check_joint(plan, room)
    joint = _joint(plan, processes)
    if joint > room:
        raise InputError(
            f"{have}, but the joint stage (train.joint: {plan.recipe.train.joint:g}) needs about"
            f" {joint / 2**30:.1f} GiB. Set train.joint: 0 or lower {layer.size_key} ({layer.size}){more}"
        )
    usable, device = int(USABLE * available("cpu")), device_of(plan.recipe)
    if need.evaluation > usable and (device == "cpu" or not fits_for_evaluation(plan, device)):
        raise InputError(
            f"memory: {usable / 2**30:.1f} GiB usable, but evaluating base and converted model needs about {need.evaluation / 2**30:.1f} GiB."
            f" Convert fewer layers at a time (layers: ...) or lower {layer.size_key} ({layer.size})."
        )
