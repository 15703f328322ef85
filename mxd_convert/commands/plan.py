"""What `plan` shows beyond the recipe's own arithmetic: passes, memory and time on this machine."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from mxd_convert.base_model.remote_code import trusting
from mxd_convert.errors import InputError, memory_guard
from mxd_convert.plan.flops import flops_per_token
from mxd_convert.plan.memory import Memory, budget, check_memory, estimate, groups, largest_group
from mxd_convert.plan.resolve import Plan, check_space, twin_of
from mxd_convert.plan.timing import Probe, probe


@dataclass(frozen=True)
class Outlook:
    """groups: layers trained together, one pass over the text each. room: memory to be had, bytes. speed: None where it can't run here."""

    groups: list[list[int]]
    flops_per_token: int
    memory: Memory
    room: int
    speed: Probe | None
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; sizes in bytes, times in seconds."""
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
    """Memory by formula, time by a probe of a few seconds, for a run of one process on this machine. What can't fit is a warning."""
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
            memory_guard(f"the probe of the machine ran out of memory; lower {plan.recipe.layer.size_key} or train.batch_tokens"),
        ):
            speed = probe(plan)
            if plan.recipe.train.twin:
                speed = _with_twin(speed, probe(twin_of(plan)))
            return Outlook(found, work, memory, room, speed, plan.warnings)
    except InputError as error:
        return Outlook(found, work, memory, room, None, [*plan.warnings, f"run would refuse: {error}"])


def _with_twin(speed: Probe, twin: Probe) -> Probe:
    """The dense twin is trained after the layers, over the same text."""
    seconds = speed.training_seconds + twin.training_seconds
    rate = speed.tokens_per_second * speed.training_seconds / seconds
    return replace(speed, training_seconds=seconds, tokens_per_second=rate)
