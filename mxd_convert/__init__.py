"""mxd-convert: turns a pretrained HuggingFace causal LM into one whose MLPs are sparse, interpretable Mixture-of-Decoders layers.

Importing this package makes `transformers`' auto classes know converted checkpoints. Nothing heavy is imported before it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mxd_convert._registration import register_where_useful

if TYPE_CHECKING:
    from mxd_convert.checkpoint import load_checkpoint
    from mxd_convert.deltas import Delta, apply, delta
    from mxd_convert.editing import edit, record
    from mxd_convert.errors import InputError
    from mxd_convert.evaluation import decompose, evaluate, expert_rank, logit_effect, steer, steered
    from mxd_convert.exporting import cache_activations, export_steering, export_transcoder
    from mxd_convert.generation import generate, parse_expert, parse_numbers, parse_scale, parse_steering
    from mxd_convert.hub import Listed, Pull, Push, list_checkpoints, load, pull, push
    from mxd_convert.inspecting import inspect
    from mxd_convert.labels import Label, add_labels, read_labels
    from mxd_convert.onnx import OnnxModel, export_onnx
    from mxd_convert.own_code import trusting
    from mxd_convert.pipeline import Result, convert
    from mxd_convert.plan import Plan, make_plan, outlook
    from mxd_convert.probing import probe
    from mxd_convert.provenance import verify_provenance
    from mxd_convert.recipe import Recipe
    from mxd_convert.recipe_file import load_recipe, parse_overrides, shipped_recipes
    from mxd_convert.report import compare, measure_steering
    from mxd_convert.report.dashboard import dashboard
    from mxd_convert.reverting import revert
    from mxd_convert.starter import starter_recipe, write_starter
    from mxd_convert.sweeping import Sweep, parse_grid, sweep
    from mxd_convert.verification import verify

__version__ = "0.1.0"

_HOMES = {
    "Delta": "deltas",
    "InputError": "errors",
    "Label": "labels",
    "Listed": "hub",
    "OnnxModel": "onnx",
    "Plan": "plan",
    "Pull": "hub",
    "Push": "hub",
    "Recipe": "recipe",
    "Result": "pipeline",
    "Sweep": "sweeping",
    "add_labels": "labels",
    "apply": "deltas",
    "cache_activations": "exporting",
    "compare": "report",
    "convert": "pipeline",
    "dashboard": "report.dashboard",
    "decompose": "evaluation",
    "delta": "deltas",
    "edit": "editing",
    "evaluate": "evaluation",
    "expert_rank": "evaluation",
    "export_onnx": "onnx",
    "export_steering": "exporting",
    "export_transcoder": "exporting",
    "generate": "generation",
    "inspect": "inspecting",
    "list_checkpoints": "hub",
    "load": "hub",
    "load_checkpoint": "checkpoint",
    "load_recipe": "recipe_file",
    "logit_effect": "evaluation",
    "make_plan": "plan",
    "measure_steering": "report",
    "outlook": "plan",
    "parse_expert": "generation",
    "parse_grid": "sweeping",
    "parse_numbers": "generation",
    "parse_overrides": "recipe_file",
    "parse_scale": "generation",
    "parse_steering": "generation",
    "probe": "probing",
    "pull": "hub",
    "push": "hub",
    "read_labels": "labels",
    "record": "editing",
    "revert": "reverting",
    "shipped_recipes": "recipe_file",
    "starter_recipe": "starter",
    "steer": "evaluation",
    "steered": "evaluation",
    "sweep": "sweeping",
    "trusting": "own_code",
    "verify": "verification",
    "verify_provenance": "provenance",
    "write_starter": "starter",
}
__all__ = [
    "Delta",
    "InputError",
    "Label",
    "Listed",
    "OnnxModel",
    "Plan",
    "Pull",
    "Push",
    "Recipe",
    "Result",
    "Sweep",
    "add_labels",
    "apply",
    "cache_activations",
    "compare",
    "convert",
    "dashboard",
    "decompose",
    "delta",
    "edit",
    "evaluate",
    "expert_rank",
    "export_onnx",
    "export_steering",
    "export_transcoder",
    "generate",
    "inspect",
    "list_checkpoints",
    "load",
    "load_checkpoint",
    "load_recipe",
    "logit_effect",
    "make_plan",
    "measure_steering",
    "outlook",
    "parse_expert",
    "parse_grid",
    "parse_numbers",
    "parse_overrides",
    "parse_scale",
    "parse_steering",
    "probe",
    "pull",
    "push",
    "read_labels",
    "record",
    "revert",
    "shipped_recipes",
    "starter_recipe",
    "steer",
    "steered",
    "sweep",
    "trusting",
    "verify",
    "verify_provenance",
    "write_starter",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"mxd_convert.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register_where_useful()
