"""`verify --provenance` finds every change to the sources of a checkpoint that its report names."""

import json
import shutil

import pytest

from mxd_convert import verify_provenance

ALL = [
    "files are those that were measured, by SHA-256",
    "its code is this package's own",
    "recipe.yaml is the recipe that the report names, by SHA-256",
    "the seed is the recipe's",
    "config.json and the report name the same base",
    "the base's tensors have the recorded SHA-256",
    "the training text has the recorded fingerprint",
    "the held-out text has the recorded fingerprint",
    "no held-out document is in the training text",
]


def outcome(folder, **options):
    return {check.check: check.ok for check in verify_provenance(folder, **options).checks}


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_an_unchanged_checkpoint_passes(converted, family):
    assert outcome(converted[family]) == dict.fromkeys(ALL, True)


def test_the_program_prints_the_checks(mxd, copy):
    status, out, _ = mxd("verify", copy, "--provenance")
    assert status == 0
    for line in ALL:
        assert f"ok          {line}" in out
    (copy / "training_log.jsonl").write_text("")
    status, out, _ = mxd("verify", copy, "--provenance")
    assert status == 1
    assert "FAILED      files are those that were measured, by SHA-256: training_log.jsonl differs or is missing" in out


@pytest.mark.parametrize(
    ("file", "change", "failing"),
    [
        ("model.safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1]), [ALL[0]]),
        ("recipe.yaml", lambda content: content.replace(b"k: 4", b"k: 5"), [ALL[0], ALL[2]]),
        ("recipe.yaml", lambda content: content.replace(b"seed: 0", b"seed: 1"), [ALL[0], ALL[2], ALL[3]]),
    ],
)
def test_every_change_is_found(copy, file, change, failing):
    path = copy / file
    before = path.read_bytes()
    path.write_bytes(change(before))
    assert path.read_bytes() != before
    assert [name for name, ok in outcome(copy).items() if ok is False] == failing


def test_a_report_of_other_texts_or_of_another_base_is_found(copy):
    report = json.loads((copy / "mxd_report.json").read_text())
    report["data"]["train"]["fingerprint"] = "0" * 64
    report["base"]["sha256"] = "0" * 64
    (copy / "mxd_report.json").write_text(json.dumps(report))
    assert [name for name, ok in outcome(copy).items() if ok is False] == [ALL[4], ALL[5], ALL[6]]


def test_missing_sources_are_not_checked(copy, models):
    (copy / "mxd_local.json").unlink()
    found = outcome(copy)
    assert [name for name, ok in found.items() if ok is None] == ALL[5:]
    assert all(ok is not False for ok in found.values())
    assert outcome(copy, base=str(models["llama"]))[ALL[5]] is True
    (copy / "modeling_mxd.py").write_text("# another version\n")
    assert outcome(copy)[ALL[1]] is None


def test_a_changed_text_is_found(models, text, tmp_path):
    from small_runs import small_recipe

    from mxd_convert import convert

    own = tmp_path / "text.jsonl"
    shutil.copyfile(text, own)
    convert(small_recipe(models["gpt2"], own, tmp_path / "out", layers=[0]), quiet=True)
    lines = own.read_text().splitlines(keepends=True)
    own.write_text("".join(line.replace("returned", "given") for line in lines))
    found = outcome(tmp_path / "out")
    assert (found[ALL[6]], found[ALL[7]], found[ALL[8]]) == (False, False, True)
    own.unlink()
    assert [name for name, ok in outcome(tmp_path / "out").items() if ok is None] == ALL[6:]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("mxd_report.json", "{"),
        ("mxd_report.json", "{}"),
        ("mxd_report.json", '{"files": [], "base": 3}'),
        ("recipe.yaml", ""),
        ("recipe.yaml", "a: ["),
    ],
)
def test_damage_is_a_failure_without_a_traceback(mxd, copy, file, content):
    (copy / file).write_text(content)
    status, out, err = mxd("verify", copy, "--provenance")
    assert (status, err) == (1, "")
    assert "FAILED" in out


def test_another_base_and_unknown_files_are_found(copy, models):
    (copy / "notes.json").write_text("{}")
    local = json.loads((copy / "mxd_local.json").read_text())
    (copy / "mxd_local.json").write_text(json.dumps({**local, "base": str(models["gpt2"])}))
    found = outcome(copy)
    assert found[ALL[5]] is False
    assert found["there are no other files"] is None
