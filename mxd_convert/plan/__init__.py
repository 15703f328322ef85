"""Plan before work: what a recipe comes to, how much memory and disk it takes, how long it will run."""

from mxd_convert.plan.forecast import Outlook, outlook
from mxd_convert.plan.memory import (
    Memory,
    base_room,
    budget,
    check_memory,
    estimate,
    fits_for_evaluation,
    groups,
    largest_group,
    shares,
)
from mxd_convert.plan.resolve import LayerPlan, Plan, check_space, make_plan
from mxd_convert.plan.speed import Probe, probe

__all__ = [
    "LayerPlan",
    "Memory",
    "Outlook",
    "Plan",
    "Probe",
    "base_room",
    "budget",
    "check_memory",
    "check_space",
    "fits_for_evaluation",
    "estimate",
    "groups",
    "largest_group",
    "make_plan",
    "outlook",
    "probe",
    "shares",
]
