"""A training step against the dense formulation and against the floor, side by side in one run.

    python benchmarks/train_step.py [--shape gpt2] [--precision fp32 bf16] [--rounds 9] [--device cpu]

Every round times each step once, in turn, so that whatever else the machine does strikes all of them. Ratios are of the medians, with
the quartiles of the rounds' own ratios. Peak memory is above that of the imports: weights, gradients, moments and all that a step makes.
"""

import argparse
import json
import statistics
from typing import Any

import torch
from steps import KINDS, SHAPES, Worker


def measure(shape: str, precisions: list[str], rounds: int, device: str, steps: int = 1) -> dict[str, Any]:
    """Seconds per round and peak bytes of every step, by name: `dense fp32`, `ours fp32`, `floor fp32`, `dense bf16`, ..."""
    workers = {f"{kind} {precision}": Worker(kind, shape, device, precision) for precision in precisions for kind in KINDS}
    for worker in workers.values():
        worker.seconds(3)
    times: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            times[name].append(worker.seconds(steps))
    peaks = {name: worker.peak_bytes() for name, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    return {"shape": shape, "device": device, "seconds": times, "peak_bytes": peaks}


def ratio(above: list[float], below: list[float]) -> str:
    """`above / below`: of the medians, and the quartiles over the rounds."""
    low, _, high = statistics.quantiles([a / b for a, b in zip(above, below, strict=True)], n=4)
    return f"{statistics.median(above) / statistics.median(below):.2f} ({low:.2f} to {high:.2f})"


def table(found: dict[str, Any]) -> str:
    times, peaks = found["seconds"], found["peak_bytes"]
    lines = ["| step | ms, median | ms, least | peak MiB |", "|---|---|---|---|"]
    for name, each in times.items():
        lines.append(f"| {name} | {1e3 * statistics.median(each):.1f} | {1e3 * min(each):.1f} | {peaks[name] / 2**20:,.0f} |")
    lines += ["", "| ratio | time: medians (quartiles of the rounds) | peak memory |", "|---|---|---|"]
    pairs = [("dense fp32", "ours fp32"), ("dense fp32", "ours bf16"), ("dense bf16", "ours bf16")]
    pairs += [("ours fp32", "floor fp32"), ("ours bf16", "floor bf16")]
    for above, below in pairs:
        if above in times and below in times:
            lines.append(f"| {above} / {below} | {ratio(times[above], times[below])} | {peaks[above] / peaks[below]:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=1, help="in a round, one after the other")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print what was measured as JSON")
    arguments = parser.parse_args()
    found = measure(arguments.shape, arguments.precision, arguments.rounds, arguments.device, arguments.steps)
    print(json.dumps(found) if arguments.json else table(found))


if __name__ == "__main__":
    main()
