"""All layers of a model in one pass, against one run per layer of the same code on as many tokens.

    python benchmarks/convert.py [--recipe stories260k] [--tokens 300000]

Also says why the ratio is what it is: what a pass shares is the base's forward and the reading of the text; the layers' own steps are
the same work either way.
"""

import argparse
import tempfile
from pathlib import Path

from runs import Finished, plan, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="stories260k")
    parser.add_argument("--tokens", type=int, default=300_000)
    arguments = parser.parse_args()
    settings = {"data__tokens": arguments.tokens, "data__eval__tokens": 8192, "train__joint": 0.0}  # which is of all layers
    made = plan(arguments.recipe, **settings)
    indices = [layer["index"] for layer in made["layers"]]
    with tempfile.TemporaryDirectory() as folder:
        one = run(arguments.recipe, Path(folder) / "all", **settings)
        each = [run(arguments.recipe, Path(folder) / str(index), layers=[index], **settings) for index in indices]
    _show(one, each, made["speed"])


def _show(one: Finished, each: list[Finished], speed: dict[str, float]) -> None:
    training = one.report["cost"]["train_seconds"], sum(run.report["cost"]["train_seconds"] for run in each)
    whole = one.seconds, sum(run.seconds for run in each)
    print(f"| | one pass, {len(each)} layers | {len(each)} runs of one layer | ratio |\n|---|---|---|---|")
    print(f"| training, s | {training[0]:.1f} | {training[1]:.1f} | {training[1] / training[0]:.2f} |")
    print(f"| whole run, s | {whole[0]:.1f} | {whole[1]:.1f} | {whole[1] / whole[0]:.2f} |")
    base, layers = speed["base_step_seconds"], speed["layers_step_seconds"]
    most = (len(each) * base + layers) / (base + layers)
    print(
        f"\nBy the probe of `plan`, the base's forward is {base / (base + layers):.0%} of a step of all layers: even if every run of one"
        f" layer needed all of it, the ratio of training could not pass {most:.2f}."
    )


if __name__ == "__main__":
    main()
