"""Compare what tests give on our classes with what they give on transformers' own, and with what the docs list."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FAMILIES = {
    "llama": "Llama",
    "gpt2": "GPT2",
    "gpt_neox": "GPTNeoX",
    "qwen3": "Qwen3",
    "gemma3_text": "Gemma3Text",
    "opt": "OPT",
    "bloom": "Bloom",
}
"""model_type -> how the names of our classes begin, after Mxd."""

SIDES = ("control", "ours")
COLUMNS = ("family", *(f"{side} {what}" for side in SIDES for what in ("passed", "failed", "skipped")))
MISSING = "not run"


class Collector:
    """A plugin of pytest: keep the outcome of each test, and the first line of what went wrong."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.problems: dict[str, str] = {}
        self.broken: list[str] = []

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.broken.append(_first_error(report.longrepr))

    def pytest_runtest_logreport(self, report: Any) -> None:
        name, subtest = report.nodeid.partition("::")[2], hasattr(report, "context")
        if report.failed:  # a test passes, as far as pytest reports it, where only subtests of it fail
            self.outcomes[name] = "failed"
            self.problems.setdefault(name, _first_error(report.longrepr))
        elif report.skipped and not subtest:
            self.outcomes.setdefault(name, "skipped")
        elif report.when == "call" and not subtest:
            self.outcomes.setdefault(name, "passed")


def _first_error(text: Any) -> str:
    lines = str(text).splitlines() or [""]
    errors = [line[1:].strip() for line in lines if line.startswith("E ")]
    return (errors or lines[-1:])[0][:300]


def parse(name: str) -> tuple[str, str, str]:
    """Split pytest's name into family, side and test: `llama_ours::test_x`, or `Tests::test_x[llama_ours-0]`."""
    group, _, test = name.rpartition("::")
    if case := re.fullmatch(r"(.+)\[(.+)-(\d+)\]", test):
        group, test = case[2], f"{case[1]}[{case[3]}]"
    family, _, side = group.rpartition("_")
    return family, side, test


def read_reasons(page: Path, suite: str, families: list[str]) -> dict[tuple[str, str], str]:
    """Read the docs' table, `| suite | test | families | reason |`, as (family, test) -> reason."""
    found = {}
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 4 and cells[0] == suite:
            listed = families if cells[2] == "all" else [name.strip() for name in cells[2].replace("`", "").split(",")]
            found |= {(family, cells[1].replace("`", "")): cells[3] for family in listed if family in families}
    return found


@dataclass
class Comparison:
    """A suite's outcomes, by family: counts of both sides, and tests that only ours fails or skips."""

    counts: dict[str, dict[str, Counter[str]]] = field(default_factory=dict)
    only: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)  # (family, test) -> (outcome, problem)

    @classmethod
    def of(cls, families: list[str], collector: Collector) -> "Comparison":
        parsed = {parse(name): name for name in collector.outcomes}
        made = cls()
        for family in families:
            made.counts[family] = {side: Counter() for side in SIDES}
            for test in sorted({test for of, _, test in parsed if of == family}):
                names = {side: parsed.get((family, side, test), "") for side in SIDES}
                control, ours = (collector.outcomes.get(names[side], MISSING) for side in SIDES)
                made.counts[family]["control"][control] += 1
                made.counts[family]["ours"][ours] += 1
                if _worse(ours, control):
                    made.only[family, test] = ours, collector.problems.get(names["ours"], "")
        return made

    def table(self) -> str:
        """Lay out the counts as text, with a last line for all families."""
        header = (*COLUMNS, "failed on ours only", "skipped on ours only")
        total = {side: sum((self.counts[family][side] for family in self.counts), Counter()) for side in SIDES}
        rows = [header]
        for family, counts in {**self.counts, "all": total}.items():
            worse = Counter(outcome for (of, _), (outcome, _) in self.only.items() if family in (of, "all"))
            numbers = [counts[side][outcome] for side in SIDES for outcome in ("passed", "failed", "skipped")]
            rows.append((family, *map(str, numbers), str(worse["failed"] + worse[MISSING]), str(worse["skipped"])))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(one, widths, strict=True)) for one in rows)

    def unexplained(self, reasons: Mapping[tuple[str, str], str]) -> list[str]:
        """List each difference that has no reason, and each reason whose test no longer differs."""
        new = [
            f"{family}: {test}: {outcome} on ours only, and not in the table: {problem}"
            for (family, test), (outcome, problem) in self.only.items()
            if (family, test) not in reasons
        ]
        return new + [
            f"{family}: {test}: in the table, and no longer fails on ours only"
            for family, test in reasons
            if (family, test) not in self.only
        ]


def _worse(ours: str, control: str) -> bool:
    order = ("passed", "skipped", "failed", MISSING)
    return order.index(ours) > order.index(control)
