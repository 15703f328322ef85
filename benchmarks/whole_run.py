"""A whole conversion: its time and memory by part, against what `plan` predicts and against the machine's matmul rate.

    python benchmarks/whole_run.py recipes/smollm2-135m.yaml --set base.model=MODEL.gguf --set data.train.path=TEXT --output FOLDER

The rates are of products of square matrices, in float32 and in bfloat16, measured before the run. A product of the base counts against
the rate of the base's dtype, one of a layer against that of `train.precision`; gradients of experts and gate, which are sparse, count as
what they need. Evaluation counts forwards of the model, and from a layer on for variants of that layer. Nothing else should run on the machine.
"""

import argparse
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from mxd_convert.plan.flops import flops_per_token
from mxd_convert.plan.resolve import Plan, make_plan
from mxd_convert.recipe.load import load_recipe, parse_overrides
from runs import command, environment

SIZE = 4096  # of the matrices
SECONDS = 2.0  # of a rate's measurement


def rate(dtype: torch.dtype) -> float:
    """Return the FLOP per second of products of square matrices."""
    a, b = (torch.randn(SIZE, SIZE).to(dtype) for _ in "ab")
    a @ b
    start, products = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        a @ b
        products += 1
    return 2 * SIZE**3 * products / (time.perf_counter() - start)


def ideal_seconds(plan: Plan, groups: list[list[int]], report: dict[str, Any], rates: dict[str, float]) -> tuple[float, float]:
    """Return the seconds that the products of training and of evaluation would take at the measured rates."""
    recipe = plan.recipe
    of_base = rates["bfloat16" if recipe.base.dtype == "bfloat16" else "float32"]
    of_layers = rates["bfloat16" if recipe.train.precision == "bf16" else "float32"]
    learning = sum(layer.shape.step_flops for layer in plan.layers)
    base = flops_per_token(plan, groups) - learning
    training = plan.tokens * (base / of_base + learning / of_layers)
    whole = 2 * (sum(plan.depth_weights) + plan.vocabulary * plan.sites[-1].d_out)
    cost, fidelity = report["cost"]["evaluation"], report["fidelity"]
    # a variant of a layer runs from that layer to the end
    suffixes = [whole - 2 * sum(plan.depth_weights[: site.index]) for site in plan.sites]
    variants = cost["suffix_passes"] / len(suffixes) * sum(suffixes) * fidelity["variants"]["tokens"]
    evaluation = (cost["full_passes"] * fidelity["tokens"] * whole + variants) / rates["float32"]
    return training, evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="continue after the training, whose time the report has")
    arguments = parser.parse_args()
    settings = parse_overrides(arguments.changes)
    rates = {"float32": rate(torch.float32), "bfloat16": rate(torch.bfloat16)}
    found = subprocess.run(
        command("plan", arguments.recipe, settings, "--json"), env=environment(), capture_output=True, check=True
    )
    predicted = json.loads(found.stdout)
    plan = make_plan(load_recipe(arguments.recipe, settings))
    start = time.perf_counter()
    more = [] if arguments.resume else ["--fresh"]
    done = subprocess.run(
        command("run", arguments.recipe, settings, "--output", str(arguments.output), *more), env=environment(), check=False
    )
    if done.returncode:
        raise SystemExit(1)
    seconds = time.perf_counter() - start
    report = json.loads((arguments.output / "mxd_report.json").read_text())
    _show(plan, predicted, report, rates, seconds + (report["cost"]["train_seconds"] if arguments.resume else 0.0))
    _show_stages(arguments.output / "training_log.jsonl")


def _show(plan: Plan, predicted: dict[str, Any], report: dict[str, Any], rates: dict[str, float], seconds: float) -> None:
    cost = report["cost"]
    training, evaluating = cost["train_seconds"], cost["evaluation"]["seconds"]
    ideal = ideal_seconds(plan, predicted["groups"], report, rates)
    print("| | measured | `plan` | plan / measured |\n|---|---|---|---|")
    for name, real, said in (
        ("training, s", training, predicted["speed"]["training_seconds"]),
        ("evaluation, s", evaluating, predicted["speed"]["evaluation_seconds"]),
        ("whole run, s", seconds, predicted["speed"]["seconds"]),
        ("peak memory, MiB", cost["peak_rss_bytes"] / 2**20, predicted["memory_bytes"]["peak"] / 2**20),
    ):
        print(f"| {name} | {real:,.0f} | {said:,.0f} | {said / real:.2f} |")
    print(f"\nMatmul rates: float32 {rates['float32'] / 1e9:,.0f}, bfloat16 {rates['bfloat16'] / 1e9:,.0f} GFLOP/s.")
    print(f"Loading, hashing, initialisation, saving, plots and checks: {seconds - training - evaluating:,.0f} s.")
    print(f"Share of the rate: training {ideal[0] / training:.0%}, with evaluation and all else {sum(ideal) / seconds:.0%}.")


def _show_stages(log: Path) -> None:
    """Print the median tokens per second of each stage: layers alone, then the joint stage, whose lines have a KL."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for name, joint in (("layers alone", False), ("joint stage", True)):
        speeds = sorted(line["tokens_per_second"] for line in lines if ("kl" in line) == joint)
        if speeds:
            print(f"{name}: {speeds[len(speeds) // 2]:,.0f} tokens/s (median of the log's lines)")


if __name__ == "__main__":
    main()
