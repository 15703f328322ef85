"""Kills a run at random moments, starts it again, and compares its end with that of a run that was left alone.

    python benchmarks/kill.py [--kills 20] [--seed 0]

A moment is anywhere between the start of the interpreter and the end of the run: while text is read, a state is written, the checkpoint
is assembled or renamed. SIGKILL each time; what comes out must be the same to the bit, log and report too.
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from runs import command, differences, environment

SETTINGS: dict[str, Any] = {
    "data.tokens": 60_000,
    "data.eval.tokens": 4096,
    "train.checkpoint_every": 5,
    "train.log_every": 3,
    "layers": [1, 3],
    "layer.experts": 300,
}


def _stage(work: Path) -> str:
    """How far a run had come when it was killed."""
    if not work.exists():
        return "before or after its work"
    if list(work.glob("checkpoint/*")):
        return "while assembling or evaluating"
    states = sorted(work.glob("state/*/step-*.json"))
    return f"after step {int(states[-1].stem.removeprefix('step-'))}" if states else "before the first state"


def kill(kills: int, seed: int, folder: Path, recipe: str = "quickstart", **changes: Any) -> list[tuple[float, str, list[str]]]:
    """Kills that many runs once each, and runs each again to its end: (second of the kill, how far it had come, differences)."""
    settings = {**SETTINGS, **changes}
    whole, cut = folder / "whole", folder / "cut"
    start = time.perf_counter()
    subprocess.run(command("run", recipe, settings, "--output", str(whole)), env=environment(), capture_output=True, check=True)
    seconds = time.perf_counter() - start
    moments, found = random.Random(seed), []
    for _ in range(kills):
        again = command("run", recipe, settings, "--output", str(cut))
        moment = moments.uniform(0.0, seconds)
        process = subprocess.Popen(again, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        stage = _stage(cut.with_name("cut.partial"))
        subprocess.run(again, env=environment(), capture_output=True, check=True)
        found.append((moment, stage, differences(whole, cut)))
        shutil.rmtree(cut)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = kill(arguments.kills, arguments.seed, Path(folder))
    for moment, stage, differing in found:
        print(f"killed at {moment:5.1f} s, {stage}: {'the same to the bit' if not differing else ', '.join(differing)}")
    same = sum(not differing for _, _, differing in found)
    print(f"{same} of {len(found)} ends are bit-identical")
    sys.exit(same < len(found))


if __name__ == "__main__":
    main()
