"""The content of mxd_report.json: base model, texts, figures, cost and versions of a run."""

import importlib.metadata
import platform
import resource
import sys
from typing import Any

import torch

from mxd_convert.data.blocks import Blocks, TextInfo
from mxd_convert.plan.resolve import Plan
from mxd_convert.recipe.presets import is_warm
from mxd_convert.recipe.schema import MASKED, Recipe, figure_mask
from mxd_convert.recipe.section import is_local
from mxd_convert.report.schema import Report
from mxd_convert.training.loop import Trained

_PACKAGES = (
    "mxd-convert",
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "tokenizers",
    "datasets",
    "huggingface-hub",
    "numpy",
)


def versions(*more: str) -> dict[str, str]:
    """Return the versions of Python and of packages that the figures depend on. more: further packages."""
    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for package in (*_PACKAGES, *more):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # a checkout that isn't installed
            continue
    return found


def build_report(
    plan: Plan, origin: dict[str, Any], train: Blocks, held_out: Blocks, trained: Trained, figures: dict[str, Any]
) -> Report:
    """Build the report of a run.

    Args:
        plan: the resolved recipe.
        origin: the base's id, revision and tensor hash, its licence and language.
        train: the training text.
        held_out: the evaluation text.
        trained: what training recorded.
        figures: the evaluation of the checkpoint as loaded from disk.
    """
    available = len(train) * train.context
    masked = MASKED[figure_mask(plan.recipe.train.mask)]
    where = "fvu, l0, dead_fraction, always_on, the shares and the jacobian; cross-entropies are over every predicted token"
    content = {
        "base": {key: value for key, value in origin.items() if key != "local"},
        "recipe_sha256": plan.recipe.published_sha256(),
        "data": {
            "train": {
                **_text(train.info),
                "tokens": trained.tokens,
                "available_tokens": available,
                "repeats": trained.tokens / available,
            },
            "eval": {**_text(held_out.info), "tokens": len(held_out) * held_out.context, "disjoint": held_out.info.disjoint},
            "masked": f"{masked} left out of {where}",
        },
        "fidelity": figures["fidelity"],
        "reliance": figures["reliance"],
        "cost": {
            "resumed_at_steps": trained.resumed_at_steps,
            "train_seconds": trained.seconds,
            "tokens_per_second": trained.tokens / trained.seconds if trained.seconds else None,
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            **figures["cost"],
        },
        "versions": versions(),
        "seeds": {"train": plan.recipe.train.seed},
        "local": _local_keys(plan.recipe),
    }
    return Report.model_validate(content)


def _local_keys(recipe: Recipe) -> list[str]:
    """Return the keys of the recipe that name something on this machine. They must be set to run it elsewhere."""
    named = {"base.model": recipe.base.model}
    for split, text in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        named |= {f"data.{split}.{key}path": source.path for key, source in text.entries()}
    init = ["train.init"] if is_warm(recipe.train.init) else []
    return [key for key, value in named.items() if is_local(value)] + init


def peak_rss_bytes() -> int:
    """Return the peak resident memory of this process, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _text(info: TextInfo) -> dict[str, Any]:
    return {key: getattr(info, key) for key in ("path", "fingerprint", "documents", "held_out_share", "dropped_overlap")}
