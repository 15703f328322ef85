"""Run the tests that transformers and PEFT publish on our classes, and on the classes that these derive from as the control.

Exit status: 0 where the tests that only our classes fail or skip are those of the table in docs/hf-tests.md, else 1.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from outcomes import FAMILIES, SIDES, Collector, Comparison, read_reasons
from sources import FetchError, packages, tests_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
REASONS = ROOT / "docs" / "hf-tests.md"
SUITES = {"transformers": ("parameterized",), "peft": ()}
"""Suite, named as the library whose tests it runs -> packages that these tests import besides."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    families = f"one of {', '.join(FAMILIES)}; repeatable (default: all)"
    parser.add_argument("--family", action="append", choices=tuple(FAMILIES), metavar="FAMILY", help=families)
    parser.add_argument("--only", action="append", choices=tuple(SUITES), help="one suite; repeatable (default: both)")
    parser.add_argument("--cache", type=Path, default=ROOT / ".hf-tests", help="folder for downloaded tests (default: .hf-tests)")
    parser.add_argument("--workers", type=int, default=2, help="processes of pytest (default: 2)")
    return parser.parse_args()


def prepare(cache: Path) -> None:
    """Set what pytest's processes read: one thread each, no network, no progress bars, where the tests are."""
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MXD_HF_TESTS": str(cache),
    }
    sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "support")]


def execute(suite: str, families: list[str], workers: int) -> Collector:
    """Run a suite's tests in pytest, with no settings and fixtures but theirs."""
    import pytest

    collector = Collector()
    quiet = ["-q", "--no-header", "--no-summary", "--show-capture=no", "--tb=short", "-W", "ignore", "-p", "no:cacheprovider"]
    location = ["-c", os.devnull, "--rootdir", str(HERE), "--confcutdir", str(HERE)]
    several = ["-n", str(workers)] if workers > 1 else ["-p", "no:xdist"]
    chosen = ["-k", " or ".join(f"{family}_{side}" for family in families for side in SIDES)]
    status = pytest.main([*quiet, *location, *several, *chosen, str(HERE / f"{suite}_cases.py")], plugins=[collector])
    if status > pytest.ExitCode.TESTS_FAILED:
        collector.broken.append(f"pytest ended with {status!r}")
    return collector


def main() -> int:
    options = arguments()
    families, cache = options.family or list(FAMILIES), options.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    prepare(cache)
    wrong, explained = [], 0
    for suite in options.only or SUITES:
        began = time.monotonic()
        try:
            folder = tests_of(suite, cache)
            packages(cache, *SUITES[suite])
        except FetchError as error:
            print(f"{suite}: {error}", file=sys.stderr)
            return 2
        print(f"{folder.parent.name}, {', '.join(families)}", flush=True)
        collector = execute(suite, families, options.workers)
        comparison, reasons = Comparison.of(families, collector), read_reasons(REASONS, suite, families)
        print(f"\n{comparison.table()}\n{time.monotonic() - began:.0f} s", flush=True)
        for (family, test), (outcome, _) in comparison.only.items():
            print(f"  {outcome} on ours only: {family}: {test}: {reasons.get((family, test), 'no reason')}")
        explained += len(comparison.only.keys() & reasons.keys())
        wrong += [f"{suite}: {line}" for line in comparison.unexplained(reasons) + collector.broken]
    print(f"\n{explained} explained, {len(wrong)} unexplained", *wrong, sep="\n  ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
