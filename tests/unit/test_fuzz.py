"""The fuzzer and the faults run at sizes of seconds, and their verdicts are right. benchmarks/fuzz.py and faults.py run large counts."""

import os
import random
import subprocess
import sys

import pytest
from project import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from robustness import mutations, results
from robustness.fixtures import Fixtures
from robustness.kinds import KINDS
from robustness.server import MOST_BYTES, Outcome
from robustness.verdict import BAD, OK, REFUSED, judge

LINE = b"mxd-convert: layer.k: 64 exceeds the 32 experts of layer 3. Set layer.k to 32 or less.\n"
TRACE = b'Traceback (most recent call last):\n  File "/x/mxd_convert/checkpoint/labels.py", line 3, in read\nKeyError: 1\n'


def outcome(status=0, out=b"", err=b"", peak=0):
    return Outcome(status, 1.0, peak, out, err)


@pytest.mark.parametrize("status", [0, 1])
def test_a_command_that_ends_normally_is_ok(status):
    assert judge(outcome(status, b"anything", b"words")).word == OK


def test_one_line_and_status_2_are_a_refusal():
    assert judge(outcome(2, err=LINE)).word == REFUSED
    assert judge(outcome(2, err=b"reading the text\n" + LINE)).word == REFUSED  # progress may be printed before


@pytest.mark.parametrize(
    ("ended", "reason"),
    [
        (outcome(1, err=TRACE), "traceback: KeyError: 1 <- checkpoint/labels.py:3 read"),
        (outcome(3), "exit status 3"),
        (outcome(-11), "ended by signal 11"),
        (outcome(None), "took more than"),
        (outcome(2), "without a line of ours"),
        (outcome(2, err=LINE + b"one\ntwo\n"), "a refusal of 3 lines"),
        (outcome(2, err=b"mxd-convert: unexpected error (labels.py, line 3): KeyError: 1\nplease report it\n"), "unexpected"),
        (outcome(2, err=b"mxd-convert: out of memory (x); free some\n"), "memory"),
        (outcome(0, peak=MOST_BYTES + 1), "GiB"),
        (outcome(2, err=b"mxd-convert: \x1b[31mx: not there\n"), "escape characters"),
    ],
)
def test_every_other_outcome_is_bad(ended, reason):
    verdict = judge(ended)
    assert verdict.word == BAD
    assert reason in verdict.reason


@pytest.mark.parametrize(("out", "word"), [(b'{"a": 1}', OK), (b'{"a": NaN}', BAD), (b"", BAD)])
def test_json_output_must_be_strict(out, word):
    assert judge(outcome(0, out), wants_json=True).word == word


def test_equal_seeds_give_equal_inputs(converted, models, text, tmp_path):
    made = Fixtures(tmp_path)
    for name, source in (("converted", converted["gpt2"]), ("tiny", models["gpt2"]), ("text.jsonl", text)):
        (tmp_path / name).symlink_to(source)
    for kind in ("recipe", "set", "config", "report", "labels", "side", "weights"):
        twice = []
        for number in (0, 1):
            folder = tmp_path / f"{kind}-{number}"
            folder.mkdir()
            arguments = KINDS[kind].make(made, folder, random.Random("7"))
            twice.append((arguments, results.result_of(folder)))
        assert twice[0] == twice[1], kind


def test_mutations_change_their_input():
    content = b'{"a": {"b": [1, 2, "three"]}, "c": null}'
    draw = random.Random(0)
    made = {mutations.json_file(content, draw) for _ in range(200)}
    assert len(made) > 150


def test_leftover_files_are_found(tmp_path):
    for name in ("out/a", "out/.b", "x.tmp/c", "out.partial/lock.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert results.leftovers(tmp_path, ["out", "out.partial"]) == ["out/.b", "x.tmp"]
    assert results.leftovers(tmp_path, ["out", "x.tmp"]) == ["out.partial", "out.partial/lock.tmp", "out/.b", "x.tmp"]


def _script(name, *arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_the_fuzzer_runs_every_kind_of_input():
    """Two inputs of each kind; benchmarks/fuzz.py runs thousands."""
    done = _script("fuzz.py", "--count", "2", "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in KINDS:
        assert f"| {kind} | 2 |" in done.stdout


@pytest.mark.slow
def test_the_fault_benchmark_runs_a_signal_and_a_full_disk():
    """One signal and one full disk; benchmarks/faults.py runs every fault on every command."""
    done = _script("faults.py", "--command", "delta", "--only", "SIGTERM", "--only", "file size", "--count", "2", "--cold", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| SIGTERM | delta | 2 | 2 | 0 | 0 |" in done.stdout
