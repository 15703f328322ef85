"""transformers' own `ModelTesterMixin` and `ConfigTester`, on classes of ours and, as the control, on the classes that these derive from.

pytest collects this file when `run.py` names it. The environment says where the tests of transformers are.
"""

import unittest
from typing import Any

import bootstrap  # noqa: F401  before the tests of transformers
import stand_ins
import torch
from outcomes import FAMILIES, SIDES
from small_models import classes, small_config
from transformers import set_seed
from transformers.models.auto import modeling_auto
from transformers.testing_utils import torch_device
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin


class ModelTester:
    """What transformers' tests ask about a family: its sizes, a config, inputs."""

    batch_size, seq_length, num_hidden_layers = 5, 7, 2
    is_training = True

    def __init__(self, family: str, side: str) -> None:
        self.family, self.side = family, side
        config = self.get_config()
        self.hidden_size, self.num_attention_heads = config.hidden_size, config.num_attention_heads
        self.vocab_size = config.vocab_size

    def get_config(self) -> Any:
        return small_config(self.family, self.side)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length), device=torch_device)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Cases(ModelTesterMixin, stand_ins.GenerationTesterMixin):
    """Their tests, for one family on one side."""

    family = side = ""
    # transformers goes by the year in a class's file, which for ours is not the family's
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self) -> None:
        set_seed(0)
        self.model_tester = ModelTester(self.family, self.side)

    def test_config(self) -> None:
        config = self.model_tester.get_config()
        more = {"mxd": config.mxd} if self.side == "ours" else {}
        ConfigTester(self, config_class=type(config), initializer_range=0.03, **more).run_common_tests()


# transformers decides by lists of class names which labels a model takes and which tests apply to it: ours are what their bases are
for family, stem in FAMILIES.items():
    modeling_auto.MODEL_MAPPING_NAMES[f"mxd_{family}"] = f"Mxd{stem}Model"
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[f"mxd_{family}"] = f"Mxd{stem}ForCausalLM"
    for side in SIDES:
        members = {"family": family, "side": side, "all_model_classes": classes(family, side), "__module__": __name__}
        globals()[f"{family}_{side}"] = type(f"{family}_{side}", (Cases, unittest.TestCase), members)
