"""A tiny random model of every family in the table, made from its config class alone, so a new row needs no change here."""

from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mxd_convert.base_model.load import auto_class

LAYERS, WIDTH, HIDDEN, VOCABULARY, POSITIONS, WINDOW = 2, 32, 48, 2048, 128, 24

# names of sizes in configs; each is set if the family has a key of that name
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": HIDDEN,
    "max_position_embeddings": POSITIONS,
    "vocab_size": VOCABULARY,
    # names used by few families
    "ffn_dim": HIDDEN,
    "word_embed_proj_dim": WIDTH,
    "ffn_hidden_size": HIDDEN,
    "num_kv_heads": 2,
    "rotary_dim": 4,
    "query_pre_attn_scalar": 8,
    # the window is shorter than the texts of these tests
    "sliding_window": WINDOW,
    "window_size": WINDOW,
    "attention_types": [[["global", "local"], 1]],
    "layer_types": ["sliding_attention", "full_attention"],
    "use_sliding_window": True,
    "no_rope_layers": [1, 0],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
"""A tiny model's sizes. Keys that a family does not have are left out."""

VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 28,
    "patch_size": 14,
}
"""Sizes of the vision tower of a model with images."""

IMAGES: dict[str, Any] = {"image_token_id": 5, "mm_tokens_per_image": 4, "spatial_merge_size": 1}
"""How images enter the text: four tokens each."""


def tiny(model_type: str, **changes: Any) -> Any:
    """Return the config of a tiny model of a family."""
    made: Any = CONFIG_MAPPING[model_type]
    if "text_config" in made.sub_configs:
        text = tiny(made().text_config.model_type).to_dict()
        outer = {key: value for key, value in IMAGES.items() if key in {*vars(made()), *made.attribute_map}}
        return made(**{"text_config": text, "vision_config": VISION, **outer, **changes})
    known = {*vars(made()), *made.attribute_map}
    sizes = {key: value for key, value in SIZES.items() if key in known}
    if getattr(made(), "layer_types", None) is None:  # in families whose layers may all be alike
        sizes.pop("layer_types", None)
    return made(**{**sizes, **changes})


def tiny_model(model_type: str, **changes: Any) -> Any:
    """Return a tiny model of a family in evaluation mode."""
    return random_model(tiny(model_type, **changes)).eval()


def random_model(config: Any) -> Any:
    """Return a model with random weights, large enough that MLPs and their biases matter."""
    torch.manual_seed(0)
    model = auto_class(config.model_type).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2 and not parameter.any():  # Gemma 3's projection of images
                parameter.normal_(std=0.1)
            elif parameter.ndim >= 2:
                parameter.mul_(4)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save_tiny(model_type: str, folder: Path, tokenizer: Any, **changes: Any) -> Path:
    tiny_model(model_type, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
