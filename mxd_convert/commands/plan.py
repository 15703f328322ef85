"""`plan`: estimate the passes, operations, memory and time of a run on this machine."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from mxd_convert.base_model.remote_code import trusting
from mxd_convert.errors import InputError, memory_guard
from mxd_convert.plan.flops import flops_per_token
from mxd_convert.plan.memory import Memory, budget, check_memory, estimate, groups, largest_group
from mxd_convert.plan.resolve import Plan, check_space, twin_of
from mxd_convert.plan.timing import MachineTiming, measure_machine


@dataclass(frozen=True)
class Forecast:
    """An estimate of a run's cost on this machine.

    Attributes:
        groups: indices of the layers that are trained together. Each group takes one pass over the text.
        flops_per_token: floating-point operations per training token, in all passes.
        memory: memory of the run's stages, in bytes.
        memory_available: in bytes.
        timing: measured on this machine; None if the run can't start on this machine.
        warnings: one line each.
    """

    groups: list[list[int]]
    flops_per_token: int
    memory: Memory
    memory_available: int
    timing: MachineTiming | None
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values; sizes in bytes, times in seconds."""
        timing = None if self.timing is None else {**asdict(self.timing), "seconds": self.timing.seconds}
        memory = {**asdict(self.memory), "peak": self.memory.peak, "available": self.memory_available}
        return {
            "groups": self.groups,
            "flops_per_token": self.flops_per_token,
            "memory_bytes": memory,
            "speed": timing,
            "warnings": self.warnings,
        }


def forecast(plan: Plan) -> Forecast:
    """Estimate the cost of a run of one process on this machine.

    Memory is calculated; time is extrapolated from a measurement of a few seconds. If the plan can't run here, the last warning
    is the reason, and `timing` is None.
    """
    available = budget(plan.recipe)
    memory = estimate(plan, largest_group(plan), room=available)
    found = groups(plan, [layer.index for layer in plan.layers], available)
    work = flops_per_token(plan, found)
    if plan.recipe.train.twin:
        twin = twin_of(plan)
        work += flops_per_token(twin, groups(twin, [layer.index for layer in twin.layers], available))
    try:
        check_memory(plan)
        check_space(plan)
        with (
            trusting(plan.recipe.base.trust_remote_code),
            memory_guard(f"the speed measurement ran out of memory. Lower {plan.recipe.layer.size_key} or train.batch_tokens."),
        ):
            timing = measure_machine(plan)
            if plan.recipe.train.twin:
                timing = _with_twin(timing, measure_machine(twin_of(plan)))
            return Forecast(found, work, memory, available, timing, plan.warnings)
    except InputError as error:
        return Forecast(found, work, memory, available, None, [*plan.warnings, f"`run` would stop: {error}"])


def _with_twin(timing: MachineTiming, twin: MachineTiming) -> MachineTiming:
    """Return the timing of the layers and of the dense twin, which is trained after them on the same text."""
    seconds = timing.training_seconds + twin.training_seconds
    rate = timing.tokens_per_second * timing.training_seconds / seconds
    return replace(timing, training_seconds=seconds, tokens_per_second=rate)
