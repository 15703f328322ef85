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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runs import command, differences, environment

SETTINGS: dict[str, Any] = {
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


def kill(kills: int, seed: int, folder: Path, tokens: int) -> Iterator[tuple[float, str, list[str]]]:
    """Kills that many runs once each, and runs each again to its end: (second of the kill, how far it had come, differences)."""
    recipe, settings = "quickstart", {**SETTINGS, "data.tokens": tokens}
    whole, cut = folder / "whole", folder / "cut"
    start = time.perf_counter()
    subprocess.run(command("run", recipe, settings, "--output", str(whole)), env=environment(), capture_output=True, check=True)
    seconds = time.perf_counter() - start
    moments = random.Random(seed)
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
        yield moment, stage, differences(whole, cut)
        shutil.rmtree(cut)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=240_000, help="that a run trains on: more of its time is then training")
    arguments = parser.parse_args()
    same = 0
    with tempfile.TemporaryDirectory() as folder:
        for moment, stage, differing in kill(arguments.kills, arguments.seed, Path(folder), arguments.tokens):
            same += not differing
            end = ", ".join(differing) or "the same to the bit"
            print(f"killed at {moment:5.1f} s, {stage}: {end}", flush=True)
    print(f"{same} of {arguments.kills} ends are bit-identical")
    sys.exit(same < arguments.kills)


if __name__ == "__main__":
    main()
