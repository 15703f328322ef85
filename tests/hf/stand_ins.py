"""Stand-ins for helpers that transformers' and PEFT's tests import and that their archives lack."""

from typing import Any

import torch


class ExportTesterMixin:
    """Replaces transformers' tests of exporters: the logits of an exported program are those of the model."""

    def test_torch_export(self: Any) -> None:
        for model_class in self.all_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            config.use_cache = False
            model = model_class(config).eval()
            program = torch.export.export(model, (), dict(inputs), strict=False)
            with torch.no_grad():
                torch.testing.assert_close(program.module()(**inputs)[0], model(**inputs)[0])


class GenerationTesterMixin:
    """Replaces transformers' tests of `generate`; ours are in tests/promises/test_generation.py."""


class StableDiffusionPipeline:
    """Replaces the class of diffusers in PEFT's isinstance checks; no model of these tests is one."""


CONFIG_KEYS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["BertModel"],
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "problem_type": "regression",
}
"""Settings that every config takes."""

TRANSFORMERS = {
    "exporters.test_export": {"ExportTesterMixin": ExportTesterMixin},
    "generation.test_utils": {"GenerationTesterMixin": GenerationTesterMixin},
    "utils.test_configuration_utils": {"config_common_kwargs": CONFIG_KEYS},
}
PEFT = {".diffusers": {"StableDiffusionPipeline": StableDiffusionPipeline}}
