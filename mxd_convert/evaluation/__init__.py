"""Measurements on held-out text: fidelity to the base model, reliance on the experts, steering."""

from mxd_convert.evaluation.run import evaluate, evaluate_models
from mxd_convert.evaluation.steering import steer

__all__ = ["evaluate", "evaluate_models", "steer"]
