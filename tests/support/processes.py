"""Two processes of torchrun, and conditions that tests wait for."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def two_processes(recipe: Path) -> subprocess.Popen:
    """Start `mxd-convert run` in two processes."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        "-m",
        "mxd_convert.cli",
        "run",
        str(recipe),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(launch, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def until(condition: Callable[[], object], seconds: float = 120, pause: float = 0.002) -> None:
    """Wait until a condition holds; fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(pause)


def wait_for_states(output: Path, count: int = 1) -> None:
    """Wait until a run has saved that many states."""
    states = output.parent / f"{output.name}.partial" / "state"
    until(lambda: len(list(states.glob("*/step-*.json"))) >= count, 90)
