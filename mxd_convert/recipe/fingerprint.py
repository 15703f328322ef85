"""The fingerprint of a recipe: a hash of the settings that determine the result."""

import hashlib
import json
from typing import Any

# Keys of `train` that don't change the result, except by rounding. They may change when a run resumes.
_MEANS = ("distribute", "memory_gib", "checkpoint_every", "tracker")
_NEWER = ("init", "k_init", "joint", "joint_lr", "jacobian", "balance")


def sha256_of(content: dict[str, Any]) -> str:
    """Return the SHA-256 of the settings of a recipe that determine the result. content: all of its settings."""
    return hashlib.sha256(json.dumps(_deciding(content), sort_keys=True).encode()).hexdigest()


def _deciding(content: dict[str, Any]) -> dict[str, Any]:
    # Newer keys are left out at their old meaning (null, 0), so that the fingerprints of older checkpoints stay valid.
    train = {key: value for key, value in content["train"].items() if key not in _MEANS}
    train = {key: value for key, value in train.items() if value or key not in _NEWER}
    if train["mask"] in ("bos", "none"):  # all that was possible before
        train["mask_bos"] = train.pop("mask") == "bos"
    layer = {key: value for key, value in content["layer"].items() if value or key != "shared_expert"}
    base = {key: value for key, value in content["base"].items() if key not in ("mlp", "gguf_file") or value is not None}
    data = {**content["data"], **{name: _as_before(content["data"][name]) for name in ("train", "eval")}}
    return {
        **{key: value for key, value in content.items() if key != "output"},
        "layer": layer,
        "train": train,
        "base": base,
        "data": data,
    }


def _as_before(text: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a text without newer keys where they have their defaults."""
    defaults = (("config", None), ("missing", "refuse"), ("sources", None))
    return {key: value for key, value in text.items() if (key, value) not in defaults}
