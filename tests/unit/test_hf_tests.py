"""How `make hf-tests` compares outcomes and reads archives. The tests of the other libraries are not run here."""

import io
import sys
import tarfile
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "hf"))
import outcomes
import sources


def comparison(**given):
    collector = outcomes.Collector()
    collector.outcomes = {name.replace("__", "::"): outcome for name, outcome in given.items()}
    return outcomes.Comparison.of(["llama", "gpt2"], collector)


def test_only_results_worse_than_the_control_need_a_reason(tmp_path):
    compared = comparison(
        llama_control__test_a="passed", llama_ours__test_a="failed",
        llama_control__test_b="passed", llama_ours__test_b="skipped",
        llama_control__test_c="failed", llama_ours__test_c="failed",
        llama_control__test_d="passed",
        gpt2_control__test_a="skipped", gpt2_ours__test_a="passed",
    )  # fmt: skip
    assert {test: outcome for (_, test), (outcome, _) in compared.only.items()} == {
        "test_a": "failed",
        "test_b": "skipped",
        "test_d": outcomes.MISSING,
    }
    page = tmp_path / "page.md"
    page.write_text(
        "| transformers | `test_a` | all | why |\n| transformers | `test_b` | `llama` | why |\n| peft | `test_d` | all | why |\n"
    )
    reasons = outcomes.read_reasons(page, "transformers", ["llama", "gpt2"])
    assert reasons == {("llama", "test_a"): "why", ("gpt2", "test_a"): "why", ("llama", "test_b"): "why"}
    assert [line.split(":")[:2] for line in compared.unexplained(reasons)] == [["llama", " test_d"], ["gpt2", " test_a"]]
    assert compared.table().splitlines()[-1].split() == ["all", "3", "1", "1", "1", "2", "1", "2", "1"]


def test_names_of_unittest_and_of_parameters_are_parsed():
    assert outcomes.parse("gpt_neox_ours::test_x_0_a") == ("gpt_neox", "ours", "test_x_0_a")
    assert outcomes.parse("Tests::test_x[gemma3_text_control-1]") == ("gemma3_text", "control", "test_x[1]")


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ({"lib-1.0/PKG-INFO": "Version: 1.1\n"}, "1.1"),
        ({"lib-1.0/PKG-INFO": "Version: 1.0\n", "lib-1.0/tests/../../../out.py": ""}, "outside"),
    ],
)
def test_wrong_versions_and_outside_paths_in_archives_are_refused(tmp_path, members, problem):
    archive = tmp_path / "lib-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as opened:
        for name, text in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            opened.addfile(member, io.BytesIO(text.encode()))
    with pytest.raises((sources.FetchError, tarfile.OutsideDestinationError), match=problem):
        sources._unpack(archive, "lib-1.0", tmp_path / "in" / "there")
    assert not list(tmp_path.rglob("out.py"))
