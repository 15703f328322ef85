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
class Outlook:
    """An estimate of a run's cost on this machine.

    Attributes:
        groups: indices of the layers that are trained together. Each group takes one pass over the text.
        flops_per_token: floating-point operations per training token, in all passes.
        memory: memory of the run's stages, in bytes.
        room: available memory, in bytes.
        speed: measured speed; None if the run can't start on this machine.
        warnings: one line each.
    """

    groups: list[list[int]]
    flops_per_token: int
    memory: Memory
    room: int
    speed: MachineTiming | None
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values; sizes in bytes, times in seconds."""
        speed = None if self.speed is None else {**asdict(self.speed), "seconds": self.speed.seconds}
        memory = {**asdict(self.memory), "peak": self.memory.peak, "available": self.room}
        return {
            "groups": self.groups,
            "flops_per_token": self.flops_per_token,
            "memory_bytes": memory,
            "speed": speed,
            "warnings": self.warnings,
        }


def outlook(plan: Plan) -> Outlook:
    """Estimate the cost of a run of one process on this machine.

    Memory is calculated; time is extrapolated from a measurement of a few seconds. If the plan can't run here, the last warning
    is the reason, and `speed` is None.
    """
    room = budget(plan.recipe)
    memory = estimate(plan, largest_group(plan), room=room)
    found = groups(plan, [layer.index for layer in plan.layers], room)
    work = flops_per_token(plan, found)
    if plan.recipe.train.twin:
        twin = twin_of(plan)
        work += flops_per_token(twin, groups(twin, [layer.index for layer in twin.layers], room))
    try:
        check_memory(plan)
        check_space(plan)
        with (
            trusting(plan.recipe.base.trust_remote_code),
            memory_guard(f"the speed measurement ran out of memory. Lower {plan.recipe.layer.size_key} or train.batch_tokens."),
        ):
            speed = measure_machine(plan)
            if plan.recipe.train.twin:
                speed = _with_twin(speed, measure_machine(twin_of(plan)))
            return Outlook(found, work, memory, room, speed, plan.warnings)
    except InputError as error:
        return Outlook(found, work, memory, room, None, [*plan.warnings, f"run would refuse: {error}"])


def _with_twin(speed: MachineTiming, twin: MachineTiming) -> MachineTiming:
    """Return the speed of the layers and of the dense twin, which is trained after them on the same text."""
    seconds = speed.training_seconds + twin.training_seconds
    rate = speed.tokens_per_second * speed.training_seconds / seconds
    return replace(speed, training_seconds=seconds, tokens_per_second=rate)
