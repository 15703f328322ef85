"""What a converted model is: fidelity, reliance on its experts, their exact parts, steering."""

from mxd_convert.evaluation.decomposition import decompose, expert_rank, logit_effect
from mxd_convert.evaluation.run import evaluate, evaluate_models
from mxd_convert.evaluation.steering import steer, steered

__all__ = ["decompose", "evaluate", "evaluate_models", "expert_rank", "logit_effect", "steer", "steered"]
