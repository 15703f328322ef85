"""`verify`: check in fresh processes that a checkpoint is complete and behaves like any transformers model."""

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

# files of a tokenizer that contain only data, no code
TOKENIZER_DATA = (
    *("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_KEY|AUTH|COOKIE|PRIVATE", re.IGNORECASE)
MODES = {False: "with the package", True: "without it, trust_remote_code=True"}


@dataclass(frozen=True)
class Check:
    """The result of one check: passed (ok True), failed (False) or not checked (None), with the reason in `detail`."""

    check: str
    ok: bool | None
    detail: str = ""


@dataclass(frozen=True)
class Verification:
    """The results of all checks of a checkpoint."""

    checkpoint: Path
    checks: list[Check]

    @property
    def ok(self) -> bool:
        """Return whether no check has failed."""
        return all(check.ok is not False for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return the results in the form of `verify --json`."""
        return {"checkpoint": self.checkpoint.name, "ok": self.ok, "checks": [asdict(check) for check in self.checks]}


def foreign_code(folder: Path) -> list[str]:
    """Return the names of a checkpoint's Python files that are missing, added, or not byte-identical to this package's."""
    ours = {path.name: path for path in SHIPPED}
    theirs = {file.name for file in folder.glob("*.py")}
    changed = [name for name in ours.keys() & theirs if (folder / name).read_bytes() != ours[name].read_bytes()]
    return sorted([*changed, *(ours.keys() ^ theirs)])


def token_ids(config: Any) -> list[list[int]]:
    """Return two fixed rows of random token ids, (2, T) with T at most 32."""
    generator = torch.Generator().manual_seed(0)
    length = min(32, getattr(config.get_text_config(), "max_position_embeddings", 32) or 32)
    return torch.randint(0, config.get_text_config().vocab_size, (2, length), generator=generator).tolist()


def has_row(config: Any) -> bool:
    """Return whether importing this package registers the checkpoint's model type with transformers."""
    return str(config.model_type).removeprefix("mxd_") in ARCHITECTURES


def in_fresh_processes(folder: Path, ids: list[list[int]], modes: list[bool], needing: list[bool], trusted: bool) -> list[Check]:
    """Return the checks of a checkpoint in fresh processes, and of their logits against each other.

    Args:
        folder: The checkpoint.
        ids: Rows of token ids to run.
        modes: One process each: whether our package is blocked in it.
        needing: The modes that need code from the checkpoint.
        trusted: Whether any code in the folder may run. If not, the processes load a copy without code other than ours.
    """
    checks, runs = [], {}
    for blocked in modes:
        mode = MODES[blocked]
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
            script = Path(__file__).with_name("fresh_process.py")
            command = [sys.executable, "-I", str(script), str(request)]
            environment = clean_environment(Path(scratch))
            process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=scratch, check=False)
            if process.returncode != 0 or not answer.is_file():
                last = (process.stderr.strip().splitlines() or [f"it exited with status {process.returncode}"])[-1]
                _check_resources(last)
                checks.append(Check(f"runs in a fresh process ({mode})", False, last))
                continue
            for entry in json.loads(answer.read_text()):
                _check_resources("" if entry["ok"] else entry["detail"])
                checks.append(Check(f"{entry['check']} ({mode})", entry["ok"], entry["detail"]))
            if output.is_file():
                runs[blocked] = load_file(output)
    if len(runs) == 2:
        problem = differ(runs[True], runs[False])  # type: ignore[no-untyped-call]
        checks.append(Check("same logits with and without the package", problem is None, problem or ""))
    return checks


def _check_resources(problem: str) -> None:
    """Raise InputError if a fresh process ran out of disk space or memory, which is not a failure of the checkpoint."""
    error = RuntimeError(problem)
    if is_disk_full(error):
        raise InputError(
            f"{tempfile.gettempdir()}: no space left on the disk while verifying, which saves copies there ({first_line(error, 120)})."
            " Free some space, or set TMPDIR to a folder with more."
        )
    if is_out_of_memory(error):
        raise InputError(
            f"out of memory while verifying ({first_line(error, 120)}). Close other programs, or use a machine with more memory."
        )


def clean_copy(folder: Path, copy: Path) -> Path:
    """Copy what loading a checkpoint needs, without any code but ours, and return the copy.

    It has the weights (as links), the tokenizer's data, the configs with our auto_map, and our Python files.
    """
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
    """Return an environment for running a checkpoint: without secrets, with empty caches in `scratch`, on one thread.

    With an empty cache, code cached by an earlier load can't be run instead of the checkpoint's.
    """
    kept = {name: value for name, value in os.environ.items() if not _SECRET.search(name)}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    caches = {"HF_HOME": scratch / "hf", "HF_MODULES_CACHE": scratch / "modules", "HF_TOKEN_PATH": scratch / "none"}
    switches = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**kept, **threads, **{name: str(path) for name, path in caches.items()}, **switches}


def _search_path(folder: Path) -> list[str]:
    """Return this process's import path without the working directory, the checkpoint and code cached by earlier loads."""
    package = str(Path(__file__).resolve().parent.parent.parent)
    others = {str(Path.cwd()), str(folder.resolve())}
    found = [entry for entry in sys.path if entry and str(Path(entry).resolve()) not in others]
    return [package, *(entry for entry in found if not (Path(entry) / "transformers_modules").exists())]


@torch.no_grad()
def against_base(folder: Path, converted: Any, base: str | None, ids: list[list[int]]) -> list[Check]:
    """Return the checks that compare a loaded checkpoint with its base: tensors outside the layers, and logits after a revert.

    Both are reported as not checked if the base is not available. base: as `override` in `base_of`. Raises InputError if it is
    given and not the checkpoint's base.
    """
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
        return [outside, Check(names[1], False, f"the shapes of the logits differ: {list(ours.shape)} and {list(theirs.shape)}")]
    # equal tensors may still give logits that differ by rounding, depending on the alignment of memory
    same = ours.equal(theirs) or (different is None and _same_tensors(reverted, original) and ours.allclose(theirs, atol=1e-5))
    return [outside, Check(names[1], same, "" if same else "the logits differ")]


def _same_tensors(one: Any, other: Any) -> bool:
    ours, theirs = untied_tensors(one), untied_tensors(other)
    return ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
