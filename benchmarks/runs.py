"""Whole runs of the command line in processes of their own, timed, and what is compared of their results."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """Runs a recipe to its end. settings: keys with __ instead of the dot."""
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
