"""mxd-convert: replace the MLPs of a pretrained Hugging Face causal LM by sparse, interpretable Mixture-of-Decoders layers.

Importing this package registers converted checkpoints with the auto classes of transformers. Each public function is imported
when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mxd_convert.checkpoint.registration import register_where_useful

if TYPE_CHECKING:
    from mxd_convert.base_model.remote_code import trusting
    from mxd_convert.checkpoint.labels import Label, read_labels
    from mxd_convert.checkpoint.provenance import verify_provenance
    from mxd_convert.checkpoint.read import load_checkpoint
    from mxd_convert.commands.apply import apply
    from mxd_convert.commands.compare import compare
    from mxd_convert.commands.dashboard import make_dashboard
    from mxd_convert.commands.delta import Delta, delta
    from mxd_convert.commands.edit import edit, record
    from mxd_convert.commands.evaluate import evaluate
    from mxd_convert.commands.export import cache_activations, export_transcoder
    from mxd_convert.commands.export_onnx import export_onnx
    from mxd_convert.commands.generate import generate, parse_expert, parse_numbers, parse_scale, parse_steering
    from mxd_convert.commands.init import starter_recipe, write_starter
    from mxd_convert.commands.inspect import inspect
    from mxd_convert.commands.label import add_labels
    from mxd_convert.commands.list import Listed, list_checkpoints
    from mxd_convert.commands.measure_steering import measure_steering
    from mxd_convert.commands.plan import forecast
    from mxd_convert.commands.probe import probe
    from mxd_convert.commands.pull import Pull, pull
    from mxd_convert.commands.push import Push, push
    from mxd_convert.commands.revert import revert
    from mxd_convert.commands.run import Result, convert
    from mxd_convert.commands.sample import Sample, sample
    from mxd_convert.commands.sweep import Sweep, parse_arm, parse_grid, sweep
    from mxd_convert.commands.verify import verify
    from mxd_convert.errors import InputError
    from mxd_convert.evaluation.experts.decomposition import decompose, expert_rank, logit_effect
    from mxd_convert.evaluation.steering import steer, steered
    from mxd_convert.export.lm_eval import export_steering
    from mxd_convert.hub.loading import load
    from mxd_convert.onnx.runtime import OnnxModel
    from mxd_convert.plan.resolve import Plan, make_plan
    from mxd_convert.recipe.load import load_recipe, parse_overrides, shipped_recipes
    from mxd_convert.recipe.schema import Recipe

__version__ = "0.1.0"

_HOMES = {
    "Delta": "commands.delta",
    "InputError": "errors",
    "Label": "checkpoint.labels",
    "Listed": "commands.list",
    "OnnxModel": "onnx.runtime",
    "Plan": "plan.resolve",
    "Pull": "commands.pull",
    "Push": "commands.push",
    "Recipe": "recipe.schema",
    "Result": "commands.run",
    "Sample": "commands.sample",
    "Sweep": "commands.sweep",
    "add_labels": "commands.label",
    "apply": "commands.apply",
    "cache_activations": "commands.export",
    "compare": "commands.compare",
    "convert": "commands.run",
    "decompose": "evaluation.experts.decomposition",
    "delta": "commands.delta",
    "edit": "commands.edit",
    "evaluate": "commands.evaluate",
    "expert_rank": "evaluation.experts.decomposition",
    "export_onnx": "commands.export_onnx",
    "export_steering": "export.lm_eval",
    "export_transcoder": "commands.export",
    "generate": "commands.generate",
    "inspect": "commands.inspect",
    "list_checkpoints": "commands.list",
    "load": "hub.loading",
    "load_checkpoint": "checkpoint.read",
    "load_recipe": "recipe.load",
    "logit_effect": "evaluation.experts.decomposition",
    "make_dashboard": "commands.dashboard",
    "make_plan": "plan.resolve",
    "measure_steering": "commands.measure_steering",
    "forecast": "commands.plan",
    "parse_expert": "commands.generate",
    "parse_arm": "commands.sweep",
    "parse_grid": "commands.sweep",
    "parse_numbers": "commands.generate",
    "parse_overrides": "recipe.load",
    "parse_scale": "commands.generate",
    "parse_steering": "commands.generate",
    "probe": "commands.probe",
    "pull": "commands.pull",
    "push": "commands.push",
    "read_labels": "checkpoint.labels",
    "record": "commands.edit",
    "revert": "commands.revert",
    "sample": "commands.sample",
    "shipped_recipes": "recipe.load",
    "starter_recipe": "commands.init",
    "steer": "evaluation.steering",
    "steered": "evaluation.steering",
    "sweep": "commands.sweep",
    "trusting": "base_model.remote_code",
    "verify": "commands.verify",
    "verify_provenance": "checkpoint.provenance",
    "write_starter": "commands.init",
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
    "Sample",
    "Sweep",
    "add_labels",
    "apply",
    "cache_activations",
    "compare",
    "convert",
    "make_dashboard",
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
    "forecast",
    "parse_expert",
    "parse_arm",
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
    "sample",
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
