"""Whole runs of the command line in processes of their own, timed, and what is compared of their results."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("MXD_SHARED", ROOT.parent / "shared"))


@dataclass(frozen=True)
class Finished:
    """A run that ended well: its wall time in seconds, start of the interpreter included, and its report."""

    seconds: float
    report: dict[str, Any]


def command(verb: str, recipe: str, settings: dict[str, Any], *more: str) -> list[str]:
    changes = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    return [sys.executable, "-m", "mxd_convert.cli", verb, recipe, *changes, *more]


def environment() -> dict[str, str]:
    return {**os.environ, "MXD_SHARED": str(SHARED), "HF_HUB_OFFLINE": "1"}


def run(recipe: str, output: Path, **settings: Any) -> Finished:
    """Runs a recipe to its end. settings: keys with __ in place of the dot."""
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    start = time.perf_counter()
    done = subprocess.run(
        command("run", recipe, changes, "--output", str(output), "--fresh"),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return Finished(time.perf_counter() - start, json.loads((output / "mxd_report.json").read_text()))


def plan(recipe: str, **settings: Any) -> dict[str, Any]:
    """What `plan --json` says of a recipe."""
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    done = subprocess.run(
        command("plan", recipe, changes, "--json"), env=environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def differences(one: Path, other: Path) -> list[str]:
    """In what two finished checkpoints differ: weights to the bit; report and log but for times, memory and what says of a resumed run."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    found = [
        f"weights: {name}"
        for name in ours.keys() | theirs.keys()
        if name not in ours or name not in theirs or not ours[name].equal(theirs[name])
    ]
    reports = [json.loads((folder / "mxd_report.json").read_text()) for folder in (one, other)]
    for report in reports:
        for name in ("training_log.jsonl", "recipe.yaml"):  # they hold times, and the folder's name
            del report["files"][name]
    found += [f"report: {key}" for key in reports[0] if key != "cost" and reports[0][key] != reports[1][key]]
    logs = []
    for folder in (one, other):
        lines = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
        logs.append([{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines])
    return found + (["log"] if logs[0] != logs[1] else [])
