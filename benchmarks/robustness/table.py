"""How the tries of benchmarks/faults.py ended, counted."""

from collections import Counter
from dataclasses import dataclass, field

SAME, LINE, BAD = "same result", "one line", "BAD"


@dataclass(frozen=True)
class Attempt:
    """One disturbed command. note: what was wrong."""

    fault: str
    command: str
    end: str
    note: str = ""


@dataclass
class Table:
    counts: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, attempt: Attempt) -> None:
        self.counts.setdefault((attempt.fault, attempt.command), Counter())[attempt.end] += 1
        if attempt.note:
            self.notes.append(f"{attempt.fault}: {attempt.note}")

    @property
    def bad(self) -> int:
        return sum(count[BAD] for count in self.counts.values())

    def __str__(self) -> str:
        lines = ["| fault | command | tries | same result | one line | BAD |", "|---|---|---|---|---|---|"]
        totals: dict[str, Counter[str]] = {}
        for (fault, command), count in self.counts.items():
            lines.append(_row(fault, command, count))
            totals.setdefault(fault, Counter()).update(count)
        lines += [_row(fault, "all", count) for fault, count in totals.items()]
        return "\n".join(lines)


def _row(fault: str, command: str, count: Counter[str]) -> str:
    return f"| {fault} | {command} | {count.total()} | {count[SAME]} | {count[LINE]} | {count[BAD]} |"
