"""What `train.preset: fast` is worth: MxDs against the paper's procedure, transcoders, the additive control and the dense twin.

All have the same tokens. All but the twin, which has no experts, have the same parameters.

    python benchmarks/study.py [--models stories260k prose-neox] [--k 8 4 32] [--seeds 0 1 2] [--arms ...] [--results study.jsonl]
    python benchmarks/study.py --models stories260k --k 8 4 --tokens 600000 300000 1200000 2400000 10000000 --plot budget.png

Every arm gets the same search over learning rates, on the first budget, K and seed, judged on the training text at the end of the
training: by KL(base || converted), or without a joint stage by what is left unexplained of the layers' outputs; the held-out text is
for the table alone. The tables are headed by the rates that were compared, and by whether the best is the lowest or highest of them. Each run
is a conversion of all layers by the command line, evaluated as loaded from disk. Runs that are in the results file are not repeated, so
an interrupted study resumes. The file is assumed to be of this procedure: begin another file if the procedure has changed.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator

from runs import run

# `fast` before December 2026: transcoders in MxD's parametrisation. A fifth of the rate in the joint stage, a quarter of the hidden units
BEFORE = {"layer.shared_expert": False, "train.jacobian": 0.0}
ARMS: dict[str, dict[str, Any]] = {
    "MxD": {},
    "MxD, paper": {"train.preset": "paper"},  # but for the learning rate, and a warm-up that ends before a short run does
    "MxD, fast before": BEFORE,
    "transcoder": {"layer.kind": "transcoder"},
    "skip transcoder": {"layer.kind": "skip_transcoder"},
    "additive control": {"layer.kind": "dense_assisted"},
    "dense twin": {"layer.kind": "dense_twin"},
}
# transcoders are matched to the parameters of what the recipes ask for: a plain one of width 32 I
MODELS: dict[str, dict[str, Any]] = {
    "stories260k": {"layer.experts": "auto", "data.tokens": 600_000, "data.eval.tokens": 65_536},
    "prose-neox": {"layer.experts": "auto", "data.tokens": 300_000, "data.eval.tokens": 32_768},
}
HIDDEN = {"stories260k": 43, "prose-neox": 256}  # a quarter of the MLP's
RATES = (2.5e-3, 5e-3, 1e-2, 2e-2)
PAPER_BATCH, WARMUP = 4096, 0.05  # of the preset; of the steps
OF_LAYERS = ("gate_share", "hidden_share", "product_share", "expert_share", "routing_necessity")
LAST = 0.1  # of the training, in which its KL or FVU is what a learning rate is judged by


@dataclass(frozen=True)
class Case:
    model: str
    arm: str
    k: int
    lr: float
    seed: int
    tokens: int

    def settings(self) -> dict[str, Any]:
        arm = ARMS[self.arm]
        changes = {**MODELS[self.model], "train.preset": "fast", "layer.k": self.k, **arm, "data.tokens": self.tokens}
        if arm is BEFORE:
            changes |= {"layer.hidden": HIDDEN[self.model], "train.joint_lr": self.lr / 5}
        if changes["train.preset"] == "paper":
            changes["train.warmup_steps"] = max(1, int(WARMUP * self.tokens / PAPER_BATCH))
        return {**changes, "train.lr": self.lr, "train.seed": self.seed}


class Results:
    """Figures of finished runs, by case, in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.figures: dict[Case, dict[str, Any]] = {}
        text = path.read_text() if path.exists() else ""
        whole, _, rest = text.rpartition("\n")
        if rest:  # of a line whose writing was interrupted
            path.write_text(f"{whole}\n" if whole else "")
        for line in map(json.loads, whole.splitlines()):
            self.figures[Case(**line["case"])] = line["figures"]

    def of(self, case: Case) -> dict[str, Any]:
        if case not in self.figures:
            self.figures[case] = measure(case)
            with self.path.open("a") as file:
                file.write(json.dumps({"machine": machine(), "case": vars(case), "figures": self.figures[case]}) + "\n")
            print(f"{case}: rise {self.figures[case]['rise']:.3f}", flush=True)
        return self.figures[case]


def machine() -> str:
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return f"{place}, torch {torch.__version__.partition('+')[0]}"


def measure(case: Case) -> dict[str, Any]:
    """One conversion's figures: of each that is a layer's, the layers' list."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        report = run(case.model, output, **{key.replace(".", "__"): value for key, value in case.settings().items()}).report
        log = [json.loads(line) for line in (output / "training_log.jsonl").read_text().splitlines()]
    fidelity, reliance = report["fidelity"], report["reliance"]["layers"].values()
    late = [line for line in log if line["step"] > (1 - LAST) * log[-1]["step"]]
    figures = {name: [layer[name] for layer in reliance] for name in next(iter(reliance))}
    return {
        "rise": fidelity["delta_ce"],
        "rise_se": fidelity["delta_ce_se"],
        "verdict": report["reliance"]["verdict"],
        "fvu": [layer["fvu"] for layer in fidelity["layers"].values()],
        "jacobian_error": [layer["jacobian"]["data"]["relative_squared_error"] for layer in fidelity["layers"].values()],
        "train_fvu": statistics.mean(layer["fvu"] for line in late for layer in line["layers"].values()),
        "train_kl": statistics.mean(line["kl"] for line in late) if "kl" in late[0] else None,
        "dead": [layer["dead_fraction"] for layer in fidelity["layers"].values()],
        **figures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    names = ", ".join(f'"{arm}"' for arm in ARMS)
    parser.add_argument(
        "--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM", help=f"of {names}; all of them if left out"
    )
    parser.add_argument("--k", nargs="+", type=int, default=[8, 4, 32], help="the first is the one at which rates are chosen")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--tokens", nargs="+", type=int, help="budgets, instead of 600,000 (stories260k) and 300,000 (prose-neox)"
    )
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="learning rates to choose from")
    parser.add_argument(
        "--plot", type=Path, help="PNG to write: rise and lowest share against tokens, one column per model and K"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once, a thread each")
    parser.add_argument("--results", type=Path, default=Path("study.jsonl"))
    parser.add_argument("--known", action="store_true", help="run nothing: tables and plot of what the results file has")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    results = Results(arguments.results)
    done: list[list[Case]] = []

    def kept(cases: list[Case]) -> list[Case]:
        return [case for case in cases if case in results.figures] if arguments.known else cases

    with ThreadPoolExecutor(arguments.jobs) as pool:
        for model in arguments.models:
            budgets = arguments.tokens or [MODELS[model]["data.tokens"]]
            of_first = (arguments.k[0], arguments.seeds[0], budgets[0])
            searched = {arm: kept([_case(model, arm, lr, *of_first) for lr in arguments.rates]) for arm in arguments.arms}
            list(pool.map(results.of, [case for cases in searched.values() for case in cases]))
            best = {arm: best_rate(results, cases) for arm, cases in searched.items() if cases}
            print(f"\n{model}: learning rates, K = {of_first[0]}, {of_first[2]:,} tokens, by the training text\n")
            print("\n".join(f"- {arm}: {of_rates(lr, [case.lr for case in searched[arm]])}" for arm, lr in best.items()))
            for tokens in budgets:
                groups = [
                    kept([_case(model, arm, lr, k, seed, tokens) for seed in arguments.seeds])
                    for arm, lr in best.items()
                    for k in (arguments.k if "twin" not in arm else arguments.k[:1])
                ]
                groups = [group for group in groups if group]
                list(pool.map(results.of, [case for group in groups for case in group]))
                print(f"\n{model}, {tokens:,} tokens\n")
                print(table(results, groups), flush=True)
                done += groups
    if arguments.plot:
        plot(results, done, arguments.plot)


def _case(model: str, arm: str, lr: float, k: int, seed: int, tokens: int) -> Case:
    return Case(model, arm, k, lr, seed, tokens)


def best_rate(results: Results, cases: Iterable[Case]) -> float:
    """Of cases that differ in the learning rate: the one that is best on the training text."""

    def left(case: Case) -> float:
        figures = results.of(case)
        return float(figures["train_fvu"] if figures["train_kl"] is None else figures["train_kl"])

    return min(cases, key=left).lr


def of_rates(best: float, rates: Iterable[float]) -> str:
    """A rate, with those that it is the best of."""
    rates = sorted(rates)
    if len(rates) == 1:
        return f"{best:g}, the only one tried"
    edge = {rates[0]: ", the lowest", rates[-1]: ", the highest"}.get(best, "")
    return f"{best:g}, of {' '.join(f'{rate:g}' for rate in rates)}{edge}"


def table(results: Results, groups: Iterable[list[Case]]) -> str:
    """A row a group of seeds: the mean rise, its range and standard error, and the range of each figure over layers and seeds.

    The error is the larger of two: over documents (the mean of the seeds'), and over seeds.
    """
    columns = (
        "",
        "seeds",
        "K",
        "LR",
        "rise",
        "FVU",
        "Jacobian error",
        *(name.replace("_", " ") for name in OF_LAYERS),
        "verdict",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for cases in groups:
        runs = [results.of(case) for case in cases]
        rises = [figures["rise"] for figures in runs]
        error = statistics.mean(figures["rise_se"] for figures in runs)
        spread = ""
        if len(rises) > 1:
            spread = f" ({min(rises):.3f} to {max(rises):.3f})"
            error = max(error, statistics.stdev(rises) / len(rises) ** 0.5)
        rise = f"{statistics.mean(rises):.3f} ± {error:.3f}{spread}"
        cells = [cases[0].arm, str(len(cases)), str(cases[0].k), f"{cases[0].lr:g}", rise]
        cells += [_range(value for figures in runs for value in figures[name]) for name in ("fvu", "jacobian_error", *OF_LAYERS)]
        verdicts = sorted({figures["verdict"] for figures in runs})
        lines.append(f"| {' | '.join([*cells, '; '.join(verdicts)])} |")
    return "\n".join(lines)


def plot(results: Results, groups: Iterable[list[Case]], path: Path) -> None:
    """Rise and lowest gate or hidden share against tokens, means over seeds, and the range: one line per arm, one column per model and K."""
    columns: dict[tuple[str, int], dict[str, dict[int, list[dict[str, Any]]]]] = {}
    for cases in groups:
        first = cases[0]
        arms = columns.setdefault((first.model, first.k), {})
        arms.setdefault(first.arm, {})[first.tokens] = [results.of(case) for case in cases]
    colours = {arm: f"C{number}" for number, arm in enumerate(dict.fromkeys(arm for arms in columns.values() for arm in arms))}
    rows: dict[str, Callable[[dict[str, Any]], float]] = {
        "rise in held-out cross-entropy, nats": lambda figures: figures["rise"],
        "lowest gate or hidden share": lambda figures: min(
            share or 0.0 for share in figures["gate_share"] + figures["hidden_share"]
        ),
    }
    size = (6.4 * len(columns), 6.4)
    figure, axes = plt.subplots(2, len(columns), figsize=size, height_ratios=(3, 2), squeeze=False, layout="constrained")
    for column, ((model, k), arms) in enumerate(columns.items()):
        for axis, (label, value) in zip(axes[:, column], rows.items(), strict=True):
            for arm, points in arms.items():
                budgets = sorted(points)
                of_seeds = [[value(figures) for figures in points[tokens]] for tokens in budgets]
                axis.plot(budgets, [statistics.mean(values) for values in of_seeds], marker="o", label=arm, color=colours[arm])
                low, high = ([extreme(values) for values in of_seeds] for extreme in (min, max))
                axis.fill_between(budgets, low, high, color=colours[arm], alpha=0.2, linewidth=0)
            axis.set(xlabel="tokens of training", ylabel=label, xscale="log")
            axis.set_ylim(bottom=0)
            axis.xaxis.set_major_locator(FixedLocator(sorted({tokens for points in arms.values() for tokens in points})))
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.xaxis.set_minor_locator(NullLocator())
        axes[0, column].set_title(f"{model}, K = {k}")
        axes[1, column].set_ylim(top=1.05)
    lines = {line.get_label(): line for axis in axes[0] for line in axis.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _range(values: Iterable[float | None]) -> str:
    """The lowest and highest of the values that are known."""
    known = [value for value in values if value is not None]
    return f"{min(known):.2f} to {max(known):.2f}" if known else "-"


if __name__ == "__main__":
    main()
