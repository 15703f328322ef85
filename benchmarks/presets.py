"""What a step of `train.preset: fast` costs, and how soon it is where the `fast` of before December 2026 ended, side by side in one run.

    python benchmarks/presets.py [--recipe stories260k] [--tokens 100000] [--rounds 3]

Both are trained in turn, round by round, by the command line; speeds are medians of the log's, for the layers alone and in the joint
stage. FVU is the mean over layers on the training text, in windows of the log, until the joint stage. Before: FVU of the last window.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from runs import plan, run

BEFORE = {"layer__shared_expert": False, "train__jacobian": 0.0, "train__balance": 0.0}  # and a quarter of the hidden units
STAGES = ("layers alone", "joint stage")


def lines_of(output: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of the log, by stage."""
    lines = [json.loads(line) for line in (output / "training_log.jsonl").read_text().splitlines()]
    return {name: [line for line in lines if ("kl" in line) == (name == STAGES[1])] for name in STAGES}


def fvu(line: dict[str, Any]) -> float:
    return statistics.mean(layer["fvu"] for layer in line["layers"].values())


def seconds_until(lines: list[dict[str, Any]], goal: float) -> float:
    """Seconds of training until the FVU of a window is at most `goal`; infinite if none is."""
    seconds, before = 0.0, 0
    for line in lines:
        seconds, before = seconds + (line["tokens"] - before) / line["tokens_per_second"], line["tokens"]
        if fvu(line) <= goal:
            return seconds
    return float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="stories260k")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    common: dict[str, Any] = {"data__tokens": arguments.tokens, "layer__k": arguments.k, "layer__experts": "auto"}
    common |= {"data__eval__tokens": 1024, "train__twin": False}
    hidden = plan(arguments.recipe, **common)["layers"][0]["d_hidden"]
    arms = {"before": {**common, **BEFORE, "layer__hidden": hidden // 4}, "now": common}
    found: dict[str, list[dict[str, list[dict[str, Any]]]]] = {name: [] for name in arms}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            for name, settings in arms.items():
                output = Path(folder) / f"{name}-{number}"
                run(arguments.recipe, output, **settings)
                found[name].append(lines_of(output))
    print(f"\n{arguments.recipe}, {arguments.tokens:,} tokens, K = {arguments.k}, {arguments.rounds} rounds\n")
    print("| | before, tokens/s | now, tokens/s | cost of a step, now / before: median (least to most) |\n|---|---|---|---|")
    for stage in STAGES:
        speeds = {
            name: [statistics.median(line["tokens_per_second"] for line in lines[stage]) for lines in rounds]
            for name, rounds in found.items()
        }
        ratios = sorted(before / now for before, now in zip(speeds["before"], speeds["now"], strict=True))
        cells = [stage, *(f"{statistics.median(speeds[name]):,.0f}" for name in arms)]
        print(f"| {' | '.join(cells)} | {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |")
    print("\n| round | FVU at the end, before | now | seconds to the former, before | now |\n|---|---|---|---|---|")
    for number, (before, now) in enumerate(zip(found["before"], found["now"], strict=True)):
        old, new = before[STAGES[0]], now[STAGES[0]]
        goal = fvu(old[-1])
        print(f"| {number} | {goal:.3f} | {fvu(new[-1]):.3f} | {seconds_until(old, goal):.0f} | {seconds_until(new, goal):.0f} |")


if __name__ == "__main__":
    main()
