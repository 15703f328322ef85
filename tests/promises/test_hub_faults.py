"""Faults during publishing and downloading give one clear line or a successful retry, and never half a repository."""

import json
import os
import shutil
import signal
import time

import pytest
from folders import contents
from hub_client import TOKEN, on_hub, published
from huggingface_hub import constants
from safetensors.torch import load_file

from mxd_convert import InputError, load_checkpoint
from mxd_convert.hub.client import hub_errors, with_retries

ONCE_AND_FINE = [
    ("GET", "/api/whoami"),
    ("GET", "/api/models/"),
    ("POST", "/api/repos/create"),
    ("POST", "/api/validate-yaml"),
    ("POST", "/preupload/"),
    ("POST", "/objects/batch"),
    ("PUT", "/[0-9a-f]{64}"),
    ("POST", "/commit/"),
    ("GET", "/tree/"),
]


@pytest.fixture
def folder(converted):
    return converted["gpt2"]


def kill_at(hub, process, number):
    """Kill a process at its request of that number."""
    first, pid = len(hub.requests), process.pid

    def watch(request):
        if request.number - first == number:
            os.kill(pid, signal.SIGKILL)

    hub.watch = watch


def whole_or_nothing(hub, name, folder):
    """Return whether the repository holds everything; fail if it holds a part."""
    found = on_hub(hub, name) if name in hub.repos else {}
    assert not found or found == published(folder, name)
    return bool(found)


def test_the_stored_token_is_used(hub, programs, program, folder):
    kept = programs.home / "hf" / "token"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(TOKEN)
    try:
        assert program("push", folder, "logged-in", token=None, verified=False).status == 0
    finally:
        kept.unlink()
    assert whole_or_nothing(hub, "alice/logged-in", folder)


def test_rate_limits_of_the_hub_are_respected(hub, program, folder):
    hub.fail("GET", "/api/whoami", 429, RateLimit='"api";r=0;t=2')
    started = time.monotonic()
    assert program("push", folder, "alice/limits", "--dry-run", verified=False).status == 0
    assert program("push", folder, "alice/limits", verified=False).status == 0
    assert time.monotonic() - started > 3
    hub.fail("GET", "/api/whoami", 429, times=9, RateLimit='"api";r=0;t=250')
    assert "in 251 s" in program("push", folder, "alice/limits-2", verified=False).err


@pytest.mark.parametrize("fault", [429, 500, "drop"])
def test_a_request_that_fails_once_is_retried(hub, program, folder, fault):
    name = f"alice/once-{fault}"
    for method, path in ONCE_AND_FINE:
        hub.fail(method, path, fault, **({"Retry_After": "1"} if fault == 429 else {}))
    done = program("push", folder, name, verified=False)
    assert not any(one.times for one in hub.faults), "a request that was to fail was never made"
    assert done.status == 0, done.err
    assert whole_or_nothing(hub, name, folder)


@pytest.mark.parametrize(
    ("status", "method", "path", "words"),
    [
        (401, "GET", "/api/whoami", ("does not accept your token", "hf auth login")),
        (403, "POST", "/api/repos/create", ("your token does not allow publishing",)),
        (403, "POST", "/commit/", ("your token does not allow publishing",)),
        (409, "POST", "/commit/", ("changed by someone else at the same time", "same command again")),
        (429, "POST", "/commit/", ("too many requests", "in 300 s")),
        (500, "POST", "/commit/", ("server error (status 500)", "same command again")),
        ("drop", "POST", "/api/validate-yaml", ("can't be reached", "same command again")),
    ],
)
def test_a_lasting_failure_is_a_one_line_error_and_the_next_push_resumes(
    hub, program, program_refused, folder, status, method, path, words
):
    name = f"alice/wrong-{status}-{path.strip('/').replace('/', '-')}"
    hub.fail(method, path, status, times=100, **({"Retry_After": "300"} if status == 429 else {}))
    program_refused("push", folder, name, words=(name, *words), verified=False)
    assert not whole_or_nothing(hub, name, folder)
    hub.faults.clear()
    asked = len(hub.requests)
    assert program("push", folder, name, verified=False).status == 0
    assert whole_or_nothing(hub, name, folder)
    if path == "/commit/":  # only the commit was missing
        assert not [request for request in hub.requests[asked:] if request.method == "PUT"]


def test_a_push_without_permission_is_refused(hub, programs, program_refused, folder):
    program_refused("push", folder, "bob/his", words=("bob/his", "does not allow publishing"), verified=False)
    assert "bob/his" not in hub.repos
    program_refused("push", folder, "alice/x", words=("needs a token", "hf auth login"), token=None)
    program_refused("push", folder, "alice/x", words=("does not accept your token",), token="hf_wrong")
    program_refused("push", folder, "not a name", words=("not a valid repository name",))
    offline = programs.run_anew("push", folder, "alice/x", HF_HUB_OFFLINE="1", HF_TOKEN=TOKEN)
    assert (offline.status, offline.err) == (2, "mxd-convert: HF_HUB_OFFLINE is set, so the Hub can't be reached. Unset it.\n")
    program_refused("push", folder / "nowhere", "alice/x", words=("no such folder",))
    assert "alice/x" not in hub.repos


def test_a_repository_with_other_content_is_not_changed(hub, program, program_refused, folder, converted):
    hub.put("alice/mine", {"config.json": b'{"model_type": "llama"}', "notes.txt": b"mine"})
    hub.put("alice/notes", {"thesis.tex": b"mine"})
    assert program("push", converted["llama"], "alice/other-base", verified=False).status == 0
    for name, words in (
        ("alice/mine", "a model of type llama"),
        ("alice/notes", "thesis.tex"),
        ("alice/other-base", "a model of type mxd_llama"),
    ):
        before = hub.files(name)
        program_refused("push", folder, name, words=(name, "contains something else", words, "--replace"))
        assert hub.files(name) == before
    assert program("push", folder, "alice/mine", "--replace", verified=False).status == 0
    assert on_hub(hub, "alice/mine") == published(folder, "alice/mine")
    hub.put("alice/open", {})
    program_refused("push", folder, "alice/open", "--private", words=("--private", "public"))


def test_a_concurrent_change_is_not_overwritten(hub, program, program_refused, folder):
    assert program("push", folder, "alice/shared", verified=False).status == 0
    hub.put("alice/shared", {**hub.files("alice/shared"), "recipe.yaml": b"older"})
    theirs = {**hub.files("alice/shared"), "recipe.yaml": b"changed: by someone else"}

    def interfere(request):
        if "/preupload/" in request.path:
            hub.watch = lambda request: None
            hub.put("alice/shared", theirs)

    hub.watch = interfere
    program_refused("push", folder, "alice/shared", words=("changed by someone else",), verified=False)
    assert hub.files("alice/shared") == theirs
    assert program("push", folder, "alice/shared", verified=False).status == 0
    assert on_hub(hub, "alice/shared") == published(folder, "alice/shared")


def test_a_commit_with_a_lost_answer_is_not_repeated(hub, program, folder):
    def lose(request):
        if request.method == "POST" and "/commit/" in request.path:
            hub.watch = lambda request: None
            hub.deaf = True

    hub.watch = lose
    assert program("push", folder, "alice/lost", verified=False).status == 0
    assert len(hub.repos["alice/lost"].refs["main"]) == 2  # the Hub's first and ours
    assert on_hub(hub, "alice/lost") == published(folder, "alice/lost")


def test_a_push_killed_at_every_tenth_request_resumes(hub, programs, program, folder, tmp_path):
    sharded = tmp_path / "sharded"
    model = load_checkpoint(folder)
    model.save_pretrained(sharded, max_shard_size="15KB")
    assert len(list(sharded.glob("model-*.safetensors"))) >= 10
    runs, first = 0, len(hub.requests)
    for _ in range(40):
        process = programs.start("push", sharded, "alice/killed", token=TOKEN, verified=False)
        kill_at(hub, process, 10)
        done = process.wait()
        runs += 1
        if done.status == 0:
            break
        assert done.status is None, done.err
        found = on_hub(hub, "alice/killed") if "alice/killed" in hub.repos else {}
        assert found in ({}, contents(sharded))
    assert runs >= 3, "it was hardly ever cut off"
    assert on_hub(hub, "alice/killed") == contents(sharded)
    sent = [request.path for request in hub.requests[first:] if request.method == "PUT"]
    assert len(sent) <= len(set(sent)) + 5 * runs  # uploaded files are not sent again, except for up to five in flight per kill


def test_an_interrupted_download_resumes(hub, programs, program, folder, tmp_path):
    assert program("push", folder, "alice/downloads", verified=False).status == 0
    for at in (4, 12):
        process = programs.start("pull", "alice/downloads", tmp_path / "pulled", token=TOKEN)
        kill_at(hub, process, at)
        assert process.wait().status is None
        assert not (tmp_path / "pulled").exists()
    hub.watch = lambda request: None
    assert program("pull", "alice/downloads", tmp_path / "pulled").status == 0
    assert contents(tmp_path / "pulled") == on_hub(hub, "alice/downloads")
    assert not (tmp_path / "pulled.partial").exists()


@pytest.mark.parametrize("fault", [429, 503, "drop"])
def test_a_download_that_fails_once_is_retried(hub, program, folder, tmp_path, fault):
    name = f"alice/again-{fault}"
    assert program("push", folder, name, verified=False).status == 0
    for method, path in (("GET", f"/api/models/{name}"), ("GET", "/tree/"), ("HEAD", "/resolve/"), ("GET", "/[0-9a-f]{64}")):
        hub.fail(method, path, fault, **({"Retry_After": "1"} if fault == 429 else {}))
    done = program("pull", name, tmp_path / "pulled")
    assert done.status == 0, done.err
    assert contents(tmp_path / "pulled") == on_hub(hub, name)


def test_a_file_that_stops_half_way_resumes_from_there(hub, program, tmp_path):
    size = constants.DOWNLOAD_CHUNK_SIZE  # the client discards incomplete chunks
    made = hub.put("bob/large", {"config.json": b'{"model_type": "mxd_llama"}', "model.safetensors": os.urandom(3 * size)})
    weights = made.refs["main"][-1].files["model.safetensors"].sha256
    hub.fail("GET", weights, "cut")
    first = len(hub.requests)
    assert program("pull", "bob/large", tmp_path / "pulled").status == 0
    asked = [request.range for request in hub.requests[first:] if request.method == "GET" and weights in request.path]
    assert asked == [None, f"bytes={size}-"]
    assert contents(tmp_path / "pulled") == on_hub(hub, "bob/large")


def test_impossible_pulls_are_refused(hub, program, program_refused, folder, tmp_path):
    hub.put("bob/llama", {"config.json": b'{"model_type": "llama"}'})
    hub.put("bob/hidden", {"config.json": b"{}"}, private=True)
    program_refused("pull", "bob/llama", tmp_path / "a", words=("bob/llama: contains a llama model", "mxd-convert list"))
    program_refused("pull", "bob/hidden", tmp_path / "a", words=("no such repository", "your token does not allow reading it"))
    program_refused("pull", "bob/nothing", tmp_path / "a", words=("no such repository", "hf auth login"), token=None)
    assert program("push", folder, "alice/pulls", verified=False).status == 0
    program_refused("pull", "alice/pulls", tmp_path / "a", "--revision", "v9", words=("--revision v9", "no such branch"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    program_refused("pull", "alice/pulls", tmp_path / "mine", words=("contains other files",))
    assert contents(tmp_path / "mine") == {"notes.txt": b"mine"}
    program_refused("pull", "alice/pulls", tmp_path / "b", words=("no space left on the disk",), largest_file=20_000)
    assert not (tmp_path / "b").exists()
    assert program("pull", "alice/pulls", tmp_path / "b").status == 0
    assert load_file(tmp_path / "b" / "model.safetensors").keys()


def test_a_pull_with_little_memory_is_complete_or_refused(program, folder, tmp_path):
    assert program("push", folder, "alice/small", verified=False).status == 0
    for number, mib in enumerate((0, 2, 9, 40)):
        done = program("pull", "alice/small", tmp_path / f"{number}", addresses=mib * 2**20)
        assert done.status == 0 or (done.status == 2 and "out of memory" in done.err)
        assert (tmp_path / f"{number}").exists() == (done.status == 0)


def test_a_file_with_a_wrong_hash_is_discarded(hub, program, program_refused, folder, tmp_path):
    assert program("push", folder, "alice/hashes", verified=False).status == 0
    blob = hub.repos["alice/hashes"].refs["main"][-1].files["model.safetensors"]
    kept = hub.storage[blob.sha256]
    hub.storage[blob.sha256] = kept[:-1] + bytes([kept[-1] ^ 1])  # the same length, one bit
    try:
        program_refused(
            "pull", "alice/hashes", tmp_path / "a", words=("model.safetensors arrived with another hash", "same command again")
        )
    finally:
        hub.storage[blob.sha256] = kept
    assert not (tmp_path / "a").exists()
    assert program("pull", "alice/hashes", tmp_path / "a").status == 0
    assert contents(tmp_path / "a") == on_hub(hub, "alice/hashes")


def test_the_token_is_in_no_traceback(hub, program, programs, folder):
    hub.fail("POST", "/api/repos/create", 403)
    hub.fail("PUT", "/[0-9a-f]{64}", 400)
    for last in ("HfHubHTTPError", "RuntimeError"):
        done = programs.run("--debug", "push", folder, "alice/traced", token=TOKEN, verified=False)
        assert "Traceback" in done.err
        assert last in done.err
        assert TOKEN not in done.err + done.out
        assert done.status == 2


def test_a_pull_does_not_mix_revisions(hub, program, folder, tmp_path):
    assert program("push", folder, "alice/mixed", "--revision", "v1", verified=False).status == 0
    sharded = shutil.copytree(folder, tmp_path / "sharded")
    for name in ("model.safetensors", "mxd_report.json", "README.md"):
        (sharded / name).unlink()
    load_checkpoint(folder).save_pretrained(sharded, max_shard_size="100KB")
    assert program("push", sharded, "alice/mixed", verified=False).status == 0
    whole = program("pull", "alice/mixed", tmp_path / "other", "--revision", "v1")
    assert whole.status == 0
    (tmp_path / "other").rename(tmp_path / "pulled.partial")  # as if the pull had been interrupted at its end
    (tmp_path / "pulled.partial" / ".pulling").write_text("alice/mixed")
    assert program("pull", "alice/mixed", tmp_path / "pulled").status == 0
    assert contents(tmp_path / "pulled") == on_hub(hub, "alice/mixed")
    assert "model.safetensors" not in contents(tmp_path / "pulled")


def test_downloaded_files_are_not_requested_again(hub, program, folder, tmp_path):
    assert program("push", folder, "alice/arrived", verified=False).status == 0
    hub.fail("GET", "/[0-9a-f]{64}", 403, times=1, skip=3)  # not retried
    assert program("pull", "alice/arrived", tmp_path / "pulled").status == 2
    first = len(hub.requests)
    assert program("pull", "alice/arrived", tmp_path / "pulled").status == 0
    assert contents(tmp_path / "pulled") == on_hub(hub, "alice/arrived")
    again = [request for request in hub.requests[first:] if request.method == "GET" and request.path.count("/") == 1]
    assert len(again) < len(contents(tmp_path / "pulled"))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Task error: File reconstruction error: 403"),  # Xet's
        ConnectionError("Network error: unreachable"),
        json.JSONDecodeError("Expecting value", "<html>", 0),
        TypeError("got multiple values for argument 'self'"),
    ],
)
def test_every_exception_of_the_client_is_a_one_line_error(error, monkeypatch):
    asked = []

    def ask():
        asked.append(1)
        raise error

    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(InputError, match="alice/x: ") as found, hub_errors("alice/x", "publishing"):
        with_retries(ask)
    assert len(str(found.value).splitlines()) == 1
    assert len(asked) == (1 if isinstance(error, TypeError) else 4)
