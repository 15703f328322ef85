"""`verify`: proves in fresh processes that a checkpoint is whole and behaves as an ordinary one."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mxd_convert.base_model import swap
from mxd_convert.base_model.families import ARCHITECTURES
from mxd_convert.base_model.load import untied_tensors
from mxd_convert.checkpoint.fresh_process import differ
from mxd_convert.checkpoint.read import (
    original_of,
    same_outside_layers,
    weight_files,
)
from mxd_convert.errors import InputError, first_line, is_disk_full, is_out_of_memory
from mxd_convert.files import read_mapping, write_json
from mxd_convert.modeling import SHIPPED

# what a tokenizer is made of; nothing in it is run
TOKENIZER_DATA = (
    *("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_KEY|AUTH|COOKIE|PRIVATE", re.IGNORECASE)
PLACES = {False: "with the package", True: "without it, trust_remote_code=True"}


@dataclass(frozen=True)
class Check:
    """One thing that was proven (ok True), disproven (False), or could not be looked at (None), and why."""

    check: str
    ok: bool | None
    detail: str = ""


@dataclass(frozen=True)
class Verification:
    checkpoint: Path
    checks: list[Check]

    @property
    def ok(self) -> bool:
        return all(check.ok is not False for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {"checkpoint": self.checkpoint.name, "ok": self.ok, "checks": [asdict(check) for check in self.checks]}


def foreign_code(folder: Path) -> list[str]:
    """The files of Python in a checkpoint that are not, to the byte, those that this package writes there; and those that are missing."""
    ours = {path.name: path for path in SHIPPED}
    theirs = {file.name for file in folder.glob("*.py")}
    changed = [name for name in ours.keys() & theirs if (folder / name).read_bytes() != ours[name].read_bytes()]
    return sorted([*changed, *(ours.keys() ^ theirs)])


def token_ids(config: Any) -> list[list[int]]:
    """Two fixed rows of ordinary tokens."""
    generator = torch.Generator().manual_seed(0)
    length = min(32, getattr(config, "max_position_embeddings", 32) or 32)
    return torch.randint(0, config.get_text_config().vocab_size, (2, length), generator=generator).tolist()


def has_row(config: Any) -> bool:
    """Whether importing this package lets transformers know the checkpoint's model type."""
    return str(config.model_type).removeprefix("mxd_") in ARCHITECTURES


def in_fresh_processes(folder: Path, ids: list[list[int]], places: list[bool], needing: list[bool], trusted: bool) -> list[Check]:
    """places: with the package blocked or not. needing: those of them where code in the checkpoint is needed.

    trusted: whether whatever is in the folder may run; else a copy is loaded that holds no code but ours.
    """
    checks, runs = [], {}
    for blocked in places:
        place = PLACES[blocked]
        with tempfile.TemporaryDirectory() as scratch:
            request, answer, output = (Path(scratch) / name for name in ("request.json", "answer.json", "logits.safetensors"))
            content = {
                "checkpoint": str(folder.resolve() if trusted else clean_copy(folder, Path(scratch) / "checkpoint")),
                "blocked": blocked,
                "trusted": trusted or blocked in needing,
                "tokenizer_trusted": trusted,
                "path": _search_path(folder),
                "input_ids": ids,
                "answer": str(answer),
                "logits": str(output),
            }
            request.write_text(json.dumps(content))
            probe = Path(__file__).with_name("fresh_process.py")
            command = [sys.executable, "-I", str(probe), str(request)]
            environment = clean_environment(Path(scratch))
            process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=scratch, check=False)
            if process.returncode != 0 or not answer.is_file():
                last = (process.stderr.strip().splitlines() or [f"it ended with status {process.returncode}"])[-1]
                _check_resources(last)
                checks.append(Check(f"runs in a fresh process ({place})", False, last))
                continue
            for entry in json.loads(answer.read_text()):
                _check_resources("" if entry["ok"] else entry["detail"])
                checks.append(Check(f"{entry['check']} ({place})", entry["ok"], entry["detail"]))
            if output.is_file():
                runs[blocked] = load_file(output)
    if len(runs) == 2:
        problem = differ(runs[True], runs[False])  # type: ignore[no-untyped-call]
        checks.append(Check("same logits with and without the package", problem is None, problem or ""))
    return checks


def _check_resources(problem: str) -> None:
    """Raise InputError where a fresh process failed for want of disk or memory, which says nothing about the checkpoint."""
    error = RuntimeError(problem)
    if is_disk_full(error):
        raise InputError(
            f"{tempfile.gettempdir()}: no space left on the disk while verifying, which saves the checkpoint there ({first_line(error, 120)})."
            " Free some space, or set TMPDIR to a folder with more"
        )
    if is_out_of_memory(error):
        raise InputError(f"out of memory while verifying ({first_line(error, 120)}); free some, or close other programs")


def clean_copy(folder: Path, copy: Path) -> Path:
    """Make a folder of what loading a checkpoint needs and no code but ours: its weights (as links), its tokenizer's data, its configs,
    an auto_map of ours, and our own files. Returns it."""
    copy.mkdir()
    weights = weight_files(folder)
    for file in weights:
        (copy / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        (copy / file.relative_to(folder)).symlink_to(file.resolve())
    if weights != [folder / "model.safetensors"]:
        shutil.copyfile(folder / "model.safetensors.index.json", copy / "model.safetensors.index.json")
    config = read_mapping(folder / "config.json")
    stem = str(config["architectures"][0]).removesuffix("ForCausalLM")
    config["auto_map"] = {
        "AutoConfig": f"configuration_mxd.{stem}Config",
        "AutoModel": f"modeling_mxd.{stem}Model",
        "AutoModelForCausalLM": f"modeling_mxd.{stem}ForCausalLM",
    }
    write_json(copy / "config.json", config)
    for name in ("generation_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            content = read_mapping(folder / name)
            content.pop("auto_map", None)
            (copy / name).write_text(json.dumps(content), encoding="utf-8")
    for name in TOKENIZER_DATA:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, copy / name)
    for path in SHIPPED:
        shutil.copyfile(path, copy / path.name)
    return copy


def clean_environment(scratch: Path) -> dict[str, str]:
    """The environment for a process that runs a checkpoint: without tokens and other secrets, with caches of its own, on one thread.

    A cache of its own also keeps code that an earlier load left behind from standing in for the checkpoint's.
    """
    kept = {name: value for name, value in os.environ.items() if not _SECRET.search(name)}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    places = {"HF_HOME": scratch / "hf", "HF_MODULES_CACHE": scratch / "modules", "HF_TOKEN_PATH": scratch / "none"}
    switches = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**kept, **threads, **{name: str(place) for name, place in places.items()}, **switches}


def _search_path(folder: Path) -> list[str]:
    """Where this process finds its packages, but for the working directory, the checkpoint, and code that earlier loads have cached."""
    package = str(Path(__file__).resolve().parent.parent.parent)
    others = {str(Path.cwd()), str(folder.resolve())}
    found = [entry for entry in sys.path if entry and str(Path(entry).resolve()) not in others]
    return [package, *(entry for entry in found if not (Path(entry) / "transformers_modules").exists())]


@torch.no_grad()
def against_base(folder: Path, converted: Any, base: str | None, ids: list[list[int]]) -> list[Check]:
    names = ("tensors outside the layers are the base's, bit for bit", "reverting every layer gives the base's logits exactly")
    try:
        original = original_of(folder, converted, base)
    except InputError as error:
        if base is not None:
            raise
        return [Check(name, None, str(error)) for name in names]
    different = same_outside_layers(converted, original)
    outside = Check(names[0], different is None, f"{different} differs" if different else "")
    reverted = swap.remove_layers(converted, original, list(converted.mxd_layers()))
    tokens = torch.tensor(ids) % original.config.get_text_config().vocab_size
    ours, theirs = reverted(input_ids=tokens).logits, original(input_ids=tokens).logits
    if ours.shape != theirs.shape:
        return [outside, Check(names[1], False, f"their shapes differ: {list(ours.shape)} and {list(theirs.shape)}")]
    # the same arithmetic on the same bits may round in another way where memory is aligned otherwise
    same = ours.equal(theirs) or (different is None and _same_tensors(reverted, original) and ours.allclose(theirs, atol=1e-5))
    return [outside, Check(names[1], same, "" if same else "they differ")]


def _same_tensors(one: Any, other: Any) -> bool:
    ours, theirs = untied_tensors(one), untied_tensors(other)
    return ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
