"""Every command ends with one line, a documented exit status and no leftover files."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import until
from project import ROOT

import mxd_convert

PROGRAM = [sys.executable, "-m", "mxd_convert.cli"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "out of memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
            "out of memory",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "/x/y: no space left"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "/x/y: can't be used (Permission denied)"),
        (KeyError("key"), "unexpected error"),
        (mxd_convert.InputError("\x1b[31mred"), "\N{REPLACEMENT CHARACTER}[31mred"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_exception_is_a_one_line_error(mxd, monkeypatch, error, words, tmp_path):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("mxd_convert.checkpoint.labels.read_labels", fail)
    status, out, err = mxd("label", tmp_path)
    assert (status, out) == (2, "")
    assert words in err
    assert "Traceback" not in err
    assert "Traceback" in mxd("--debug", "label", tmp_path)[2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=lambda number: number.name)
def test_a_signal_leaves_no_temporary_files(converted, tmp_path, number):
    output, text = tmp_path / "new" / "dashboard", ROOT / "examples" / "python-docs.jsonl.gz"
    command = [*PROGRAM, "dashboard", str(converted["gpt2"]), "--data", str(text), "--output", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until(lambda: list(output.parent.glob(".dashboard-*/records/*")) or process.poll() is not None)
    process.send_signal(number)
    _, err = process.communicate()
    if number == signal.SIGKILL:
        assert os.listdir(output.parent) != []
        subprocess.run(command, check=True, capture_output=True)
        assert os.listdir(output.parent) == ["dashboard"]
    else:
        assert process.returncode == 130
        assert "Traceback" not in err
        assert err.splitlines()[-1] == "mxd-convert: interrupted"
        assert not output.parent.exists()


def test_a_signal_during_the_imports_ends_the_program_quietly():
    for delay in (0.15, 0.4, 0.9):
        process = subprocess.Popen([*PROGRAM, "verify", "nowhere"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate()
        assert process.returncode in (2, 130, -signal.SIGTERM), err  # the last one: the signal came before Python ran the program
        assert "Traceback" not in err


def test_an_interruption_of_an_import_inside_generated_code_has_the_same_status(tmp_path):
    (tmp_path / "typer.py").write_text("exec('raise KeyboardInterrupt')\n")
    done = subprocess.run(
        [*PROGRAM, "list"], env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, "mxd-convert: interrupted\n")


def test_too_little_address_space_for_the_imports_is_a_one_line_error():
    done = subprocess.run(
        ["bash", "-c", 'ulimit -v 950000 && exec "$@"', "bash", *PROGRAM, "list"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "the address space is limited to 0.91 GiB" in done.stderr


def test_a_full_disk_is_not_blamed_on_the_verified_checkpoint(programs, converted):
    sizes = sorted(path.stat().st_size for path in converted["gpt2"].iterdir() if path.is_file())
    limit = sizes[-1] - 1024  # bytes: all files but the weights, which are saved again, can be copied
    done = programs.run("verify", converted["gpt2"], largest_file=limit)
    assert done.status == 2, done.out
    assert "no space left on the disk while verifying" in done.err


def test_a_reader_that_closes_the_pipe_is_no_error(recipe):
    done = subprocess.run(
        f"{sys.executable} -m mxd_convert.cli plan {recipe()} | head -n 1", shell=True, capture_output=True, text=True, check=True
    )
    assert "layer" in done.stdout
    assert done.stderr == ""


def test_labels_added_at_the_same_time_are_all_kept(programs, copy, tmp_path):
    script = tmp_path / "add.py"
    script.write_text(
        "import sys, mxd_convert\nn = int(sys.argv[2])\n"
        "mxd_convert.add_labels(sys.argv[1], [{'layer': 0, 'expert': n, 'text': 't', 'author': str(n)}])\n"
    )
    together = [programs.start("python", script, copy, n) for n in range(4)]
    assert [process.wait().status for process in together] == [0] * 4
    assert [label.expert for label in mxd_convert.read_labels(copy)] == [0, 1, 2, 3]


@pytest.mark.parametrize("setting", ["WORLD_SIZE=2 RANK=0", "LOCAL_RANK=0", "PMI_SIZE=4"])
def test_variables_of_a_launcher_without_its_processes_are_refused(programs, recipe, setting):
    done = programs.run("run", recipe(), environment=dict(pair.split("=") for pair in setting.split()))
    assert done.status == 2
    assert setting.split()[0] in done.err
    assert "torchrun" in done.err


def test_an_expanded_variable_is_not_published(recipe, text, tmp_path, monkeypatch, mxd):
    monkeypatch.setenv("MXD_PLACE", str(text.parent))
    path = recipe(data={"train": {"path": "${MXD_PLACE}/text.jsonl"}})
    status, _, err = mxd("run", path, "--set", "data.tokens=1024")
    assert status == 0, err
    output = tmp_path / "out"
    published = [file for file in output.rglob("*") if file.is_file() and file.name != "mxd_local.json"]
    assert not any(str(text.parent).encode() in file.read_bytes() for file in published)
    assert "${MXD_PLACE}/text.jsonl" in (output / "recipe.yaml").read_text()
    assert mxd("verify", output, "--provenance")[0] == 0
    monkeypatch.delenv("MXD_PLACE")
    assert "recipe.yaml is the recipe that the report names" in mxd("verify", output, "--provenance")[1]


def test_only_main_ends_the_program():
    """`cli.main` alone turns an exception into a line and an exit status."""
    for path in (ROOT / "mxd_convert").rglob("*.py"):
        if path.relative_to(ROOT / "mxd_convert") not in (Path("cli/__init__.py"), Path("cli/signals.py")):
            text = path.read_text()
            assert "sys.exit(" not in text, path
            assert "os._exit(" not in text, path
