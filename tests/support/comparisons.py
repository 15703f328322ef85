"""Comparisons of two runs."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

import mxd_convert


def assert_same_weights(ours: Path, theirs: Path) -> None:
    tensors, others = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in others)


def assert_the_same(ours: mxd_convert.Result, theirs: mxd_convert.Result) -> None:
    """Compare weights bit by bit, and training logs except for tokens per second."""
    assert_same_weights(ours.output, theirs.output)
    assert log_of(ours.output) == log_of(theirs.output)


def log_of(folder: Path) -> list[dict]:
    """Return the lines of a training log without the speed."""
    lines = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]
