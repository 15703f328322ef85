"""PEFT's own tests of `target_parameters`, on the experts of our layers and, as the control, on the projections that these replace.

pytest collects this file when `run.py` names it. The environment says where the tests of PEFT are.
"""

import tempfile
from pathlib import Path
from typing import Any

import bootstrap  # noqa: F401  before the tests of PEFT
import pytest
from outcomes import FAMILIES, SIDES
from peft import LoraConfig
from peft_tests import test_target_parameters
from small_models import small_config
from tiny_models import random_model

from mxd_convert.base_model.families import ARCHITECTURES

ATTENTION = {"gpt_neox": "query_key_value", "bloom": "query_key_value"}
PLACE = tempfile.TemporaryDirectory()


def settings(family: str, side: str) -> list[dict[str, Any]]:
    """Return what adapters are put on: the parameter of every layer; that of the second layer, and modules of the attention."""
    row = ARCHITECTURES[family]
    path = f"{row.place}.experts" if side == "ours" else f"{row.mlp}.{row.down}.weight"
    parameter = path.partition("{i}.")[2]
    # PEFT takes no Conv1D, of which GPT-2's attention consists, in an adapter with parameters
    modules = [] if family == "gpt2" else [ATTENTION.get(family, "q_proj")]
    return [
        {"task_type": "CAUSAL_LM", "target_modules": [], "target_parameters": [parameter]},
        {"task_type": "CAUSAL_LM", "target_modules": modules, "target_parameters": [f"1.{parameter}"], "r": 4, "lora_alpha": 32},
    ]


def save(family: str, side: str) -> str:
    """Save a small model, its weights large enough that adapters matter; return its folder."""
    folder = Path(PLACE.name) / f"{family}-{side}"
    random_model(small_config(family, side)).save_pretrained(folder)
    return str(folder)


def cases() -> list[Any]:
    """Return the parameters of their tests: (folder, class of the adapter's config, its settings)."""
    found = []
    for family in FAMILIES:
        for side in SIDES:
            folder = save(family, side)
            for number, one in enumerate(settings(family, side)):
                found.append(pytest.param(folder, LoraConfig, one, id=f"{family}_{side}-{number}"))
    return found


test_target_parameters.ALL_CONFIGS[:] = cases()  # the list that their tests are parametrised by
TestTargetParameters = test_target_parameters.TestDecoderModelsTargetParameters
