"""What `plan` says of memory and time, against the run itself.

    python benchmarks/memory.py [--recipe quickstart --recipe stories260k]

Memory is the peak resident size of the process; time that of the whole run, start and evaluation included.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from runs import SHARED, plan, run

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "quickstart": ("quickstart", {}),
    "quickstart, bf16 moments, one layer a pass": ("quickstart", {"train__moments": "bf16", "train__memory_gib": 0.75}),
    "quickstart, 64 x, batches of 4,096": ("quickstart", {"layer__expansion": 64, "train__batch_tokens": 4096}),
    "stories260k": ("stories260k", {}),
    "prose-neox, K = 8": (
        "stories260k",
        {
            "base__model": str(SHARED / "models" / "prose-neox"),
            "data__train__path": str(SHARED / "data" / "prose.jsonl.gz"),
            "data__tokens": 150_000,
            "data__eval__tokens": 16_384,
            "layer__k": 8,
            "layer__experts": "auto",
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES, help="default: all whose models are there")
    arguments = parser.parse_args()
    print("| run | peak MiB: plan | real | plan / real | seconds: plan | real | plan / real |\n|---|---|---|---|---|---|---|")
    for name in arguments.case or [name for name in CASES if name.startswith("quickstart") or SHARED.is_dir()]:
        recipe, settings = CASES[name]
        said = plan(recipe, **settings)
        with tempfile.TemporaryDirectory() as folder:
            done = run(recipe, Path(folder) / "out", **settings)
        memory, seconds = said["memory_bytes"]["peak"], said["speed"]["seconds"]
        cost = done.report["cost"]
        real = cost["peak_gpu_bytes"] or cost["peak_rss_bytes"]
        print(f"| {name} | {memory / 2**20:,.0f} | {real / 2**20:,.0f} | {memory / real:.2f} ", end="")
        print(f"| {seconds:.0f} | {done.seconds:.0f} | {seconds / done.seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
