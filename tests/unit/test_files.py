"""Files and folders are written completely or not at all, nothing is left over, and files of strangers give one-line errors."""

import json
import os
import stat
import subprocess
import sys
import threading

import pytest

from mxd_convert import files
from mxd_convert.errors import InputError


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"figure": float("nan"), "list": [1.5, float("inf")]})
    assert json.loads(path.read_text()) == {"figure": None, "list": [1.5, None]}
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()
    with pytest.raises(UnicodeEncodeError), files.replacing(path) as temporary:
        temporary.write_text("half\ud800", encoding="utf-8")
    assert json.loads(path.read_text())["list"] == [1.5, None]
    assert os.listdir(tmp_path) == ["a.json"]


def _umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


def test_a_link_is_replaced_and_its_target_is_kept(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "link").read_text() == "new"
    assert not (tmp_path / "link").is_symlink()


def test_files_of_a_killed_process_are_removed_by_the_next_call(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from mxd_convert import files\n"
        "with files.temporary_sibling(Path(sys.argv[1]) / 'out') as scratch, files.replacing(Path(sys.argv[1]) / 'file') as temporary:\n"
        "    (scratch / 'part').write_text('x'); temporary.write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert len(os.listdir(tmp_path)) == 2
    with files.temporary_sibling(tmp_path / "out") as scratch:
        files.write_text(tmp_path / "file", "whole")
        with files.temporary_sibling(tmp_path / "out"):  # a folder in use is kept
            assert scratch.is_dir()
        assert scratch.is_dir()
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_replaces_the_old_one_or_restores_it(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with files.temporary_sibling(tmp_path / "out") as scratch:
        (scratch / "new").mkdir()
        with pytest.raises(FileNotFoundError):
            files.move_into_place(scratch / "nothing", tmp_path / "out", scratch)
        assert (tmp_path / "out" / "old").is_file()
        files.move_into_place(scratch / "new", tmp_path / "out", scratch)
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not readable JSON"),
        (b"\xff\xfe", "not readable JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1]", "holds a list; expected a mapping"),
        (b"9" * 5000, "not readable JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    ],
    ids=["cut", "encoding", "deep", "list", "digits", "pointer"],
)
def test_json_from_strangers_is_read_or_refused_in_one_line(tmp_path, content, words):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=words) as refused:
        files.read_mapping(tmp_path / "x.json")
    assert len(str(refused.value).splitlines()) == 1
    assert "x.json" in str(refused.value)


def test_links_inside_a_folder_and_into_the_hub_cache_are_accepted(tmp_path):
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs" / "1").write_text("x")
    snapshot = cache / "snapshots" / "commit"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/1")
    (snapshot / "again.json").symlink_to("config.json")
    files.check_links(snapshot)
    (snapshot / "key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"key: a symbolic link to .*elsewhere"):
        files.check_links(snapshot)


def test_a_lock_is_exclusive_and_leaves_no_file(tmp_path):
    inside, most = 0, 0

    def work():
        nonlocal inside, most
        with files.locked(tmp_path):
            inside += 1
            most = max(most, inside)
            inside -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert os.listdir(tmp_path) == []


def test_formulas_are_text_in_a_spreadsheet(tmp_path):
    files.write_csv(
        tmp_path / "x.csv", ["name", "value"], [{"name": "=HYPERLINK(1)", "value": -1.5}, {"name": "plain", "value": None}]
    )
    assert (tmp_path / "x.csv").read_text().splitlines() == ["name,value", "'=HYPERLINK(1),-1.5", "plain,"]
