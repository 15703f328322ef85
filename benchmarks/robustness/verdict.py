"""How a command ended: as it should, refused in a line or two, or BAD."""

import json
import re
from dataclasses import dataclass
from typing import Any

from robustness.server import MOST_BYTES, Outcome

OK, REFUSED, BAD = "ok", "refused", "BAD"
PREFIX = "mxd-convert: "
INTERRUPTED = 130
STATUSES = (0, 1, 2, INTERRUPTED)
MOST_LINES = 2  # of a refusal
_FRAME = re.compile(r'File "(.*)", line (\d+),? in (\w+)')


@dataclass(frozen=True)
class Verdict:
    """unexpected: an error that the program did not foresee, whose place `--debug` shows."""

    word: str
    reason: str = ""
    unexpected: bool = False


def judge(outcome: Outcome, wants_json: bool = False, limited: bool = False) -> Verdict:
    """Judge an outcome by what the program promises of its exit status and its output. limited: its memory was made too small."""
    err = outcome.err.decode("utf-8", "replace")
    reason = _broken(outcome, err, limited) or (_not_json(outcome.out) if wants_json and outcome.status in (0, 1) else "")
    if reason:
        return Verdict(BAD, reason, unexpected=reason.startswith(("unexpected", "memory")))
    if outcome.status != 2:
        return Verdict(OK)
    message = refusal(err)
    if message is None:
        return Verdict(BAD, f"exit status 2 without a line of ours: {_last(err)}")
    if len(message.splitlines()) > MOST_LINES:
        return Verdict(BAD, f"a refusal of {len(message.splitlines())} lines: {message.splitlines()[0]}")
    return Verdict(REFUSED, message)


def refusal(err: str) -> str | None:
    """Return what the program says at its end; what it was doing may be said before."""
    at = max(err.rfind(f"\n{PREFIX}") + 1, 0)
    return err[at:].strip() if err.startswith(PREFIX, at) else None


def _broken(outcome: Outcome, err: str, limited: bool) -> str:
    """What is wrong with the end, or else with what was written."""
    if outcome.status is None:
        return f"took more than {outcome.seconds:.0f} s: {_frames(err)}"
    if "Traceback (most recent call last)" in err:
        return f"traceback: {_last(err)} <- {_frames(err)}"
    if outcome.status < 0:
        return f"ended by signal {-outcome.status}: {_frames(err)}"
    if outcome.status not in STATUSES:
        return f"exit status {outcome.status}: {_last(err)}"
    return _written(outcome, err, limited)


def _written(outcome: Outcome, err: str, limited: bool) -> str:
    written = outcome.out + outcome.err
    if f"{PREFIX}unexpected" in err:
        return "unexpected: " + err.split(f"{PREFIX}unexpected", 1)[1].splitlines()[0][:200]
    if outcome.peak > MOST_BYTES:
        return f"took {outcome.peak / 2**30:.1f} GiB"
    if f"{PREFIX}out of memory" in err and not limited:
        return f"memory: only the limit stopped it: {_last(err)}"
    if b"\x1b" in written:
        return f"escape characters in the output: {written[max(written.index(27) - 40, 0) : written.index(27) + 10]!r}"
    return ""


def _not_json(out: bytes) -> str:
    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is no JSON")

    try:
        json.loads(out.decode(), parse_constant=refuse)
    except ValueError as error:
        return f"--json: {str(error)[:100]}"
    return ""


def place_of(outcome: Outcome) -> str:
    """Return where the error of a run with `--debug` came from."""
    return _frames(outcome.err.decode("utf-8", "replace"))


def _frames(err: str) -> str:
    """The last frame of ours and the innermost frame of all, in the last traceback or the dump of a process that hangs."""
    dumped = "most recent call first" in err
    found = [match.groups() for match in _FRAME.finditer(err)]
    found = found if dumped else found[::-1]
    if not found:
        return "?"
    ours = next((frame for frame in found if "/mxd_convert/" in frame[0]), found[0])
    shown = [
        "{}:{} {}".format("/".join(path.split("/")[-2:]), line, name) for path, line, name in dict.fromkeys((ours, found[0]))
    ]
    return " ... ".join(shown)


def _last(err: str) -> str:
    return (err.strip().splitlines() or ["nothing on stderr"])[-1][:200]
