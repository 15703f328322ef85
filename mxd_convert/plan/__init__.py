"""Plan before work: what a recipe comes to, how much memory and disk it takes, how long it will run."""

from mxd_convert.plan.forecast import Outlook, outlook
from mxd_convert.plan.memory import (
    Memory,
    base_room,
    budget,
    check_finish,
    check_memory,
    estimate,
    fits_for_evaluation,
    fitting_together,
    groups,
    largest_group,
    shares,
)
from mxd_convert.plan.resolve import LayerPlan, Plan, check_gradients, check_processes, check_space, make_plan, twin_of
from mxd_convert.plan.speed import Probe, probe
from mxd_convert.plan.work import flops_per_token

__all__ = [
    "LayerPlan",
    "Memory",
    "Outlook",
    "Plan",
    "Probe",
    "base_room",
    "budget",
    "check_finish",
    "check_gradients",
    "check_memory",
    "check_processes",
    "check_space",
    "estimate",
    "fits_for_evaluation",
    "fitting_together",
    "flops_per_token",
    "groups",
    "largest_group",
    "make_plan",
    "outlook",
    "probe",
    "shares",
    "twin_of",
]
