"""`verify`: proves in fresh processes that a checkpoint is whole and behaves as an ordinary one."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mxd_convert import surgery
from mxd_convert.architectures import ARCHITECTURES
from mxd_convert.checkpoint import (
    is_converted,
    load_checkpoint,
    original_of,
    read_config,
    same_outside_layers,
)
from mxd_convert.errors import InputError
from mxd_convert.modeling import configuration_mxd, modeling_mxd
from mxd_convert.own_code import NotTrusted, is_trusted, trusting

TOLERANCE = 1e-5
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


def verify(checkpoint: str | Path, base: str | None = None, trust_remote_code: bool = False) -> Verification:
    """Checks a converted checkpoint: whole files; loading, generation, saving, sharding, tied weights, bfloat16 and gradient checkpointing
    in fresh processes with and without this package; tensors outside the layers and logits after reverting against the base model.

    Without the package, and for families that have no row, the checkpoint's own code is run: where it is this package's own, to the byte, or
    with trust_remote_code.
    base: the base model, where not the recorded one. What needs a base that is not at hand is reported as not checked.
    Raises InputError where `checkpoint` is no converted checkpoint at all or `base` is not its base.
    """
    with trusting(trust_remote_code):
        return _verify(Path(checkpoint), base, is_trusted())


def _verify(folder: Path, base: str | None, trust_remote_code: bool) -> Verification:
    whole = "files are whole and fit the config"
    try:
        config = read_config(folder)
        converted = load_checkpoint(folder)
    except NotTrusted:
        raise
    except InputError as error:
        if not is_converted(folder):
            raise
        return Verification(folder, [Check(whole, False, str(error))])
    ids = _token_ids(config)
    against_base = _against_base(folder, converted, base, ids)  # first, for a wrong --base should not take long to be told
    foreign = [] if trust_remote_code else foreign_code(folder)
    needing = [blocked for blocked in PLACES if blocked or not _has_row(config)]  # the checkpoint's own code
    checks = _in_fresh_processes(folder, ids, [blocked for blocked in PLACES if not (foreign and blocked in needing)], needing)
    for blocked in needing if foreign else []:
        why = f"{foreign[0]} is not this package's own, and was not run; read it, and give --trust-remote-code"
        checks.append(Check(f"runs in a fresh process ({PLACES[blocked]})", None, why))
    return Verification(folder, [Check(whole, True), *checks, *against_base])


def foreign_code(folder: Path) -> list[str]:
    """The files of Python in a checkpoint that are not, to the byte, those that this package writes there; and those that are missing."""
    paths = [Path(str(module.__file__)) for module in (configuration_mxd, modeling_mxd)]
    ours = {path.name: path for path in paths}
    theirs = {file.name for file in folder.glob("*.py")}
    changed = [name for name in ours.keys() & theirs if (folder / name).read_bytes() != ours[name].read_bytes()]
    return sorted([*changed, *(ours.keys() ^ theirs)])


def _token_ids(config: Any) -> list[list[int]]:
    """Two fixed rows of ordinary tokens."""
    generator = torch.Generator().manual_seed(0)
    length = min(32, getattr(config, "max_position_embeddings", 32) or 32)
    return torch.randint(0, config.get_text_config().vocab_size, (2, length), generator=generator).tolist()


def _has_row(config: Any) -> bool:
    """Whether importing this package lets transformers know the checkpoint's model type."""
    return str(config.model_type).removeprefix("mxd_") in ARCHITECTURES


def _in_fresh_processes(folder: Path, ids: list[list[int]], places: list[bool], trusting: list[bool]) -> list[Check]:
    """places: with the package blocked or not. trusting: those of them where the checkpoint's own code is run."""
    checks, logits = [], {}
    for blocked in places:
        place = PLACES[blocked]
        with tempfile.TemporaryDirectory() as scratch:
            request, answer, output = (Path(scratch) / name for name in ("request.json", "answer.json", "logits.safetensors"))
            content = {
                "checkpoint": str(folder.resolve()),
                "blocked": blocked,
                "trusted": blocked in trusting,
                "package": str(Path(__file__).resolve().parent.parent),
                "input_ids": ids,
                "answer": str(answer),
                "logits": str(output),
            }
            request.write_text(json.dumps(content))
            # a cache of its own: code that an earlier load left behind must not stand in for the checkpoint's
            environment = {**os.environ, "HF_MODULES_CACHE": str(Path(scratch) / "modules"), "HF_HUB_OFFLINE": "1"}
            probe = Path(__file__).with_name("_probe.py")
            command = [sys.executable, "-I", str(probe), str(request)]
            process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=scratch, check=False)
            if process.returncode != 0 or not answer.is_file():
                last = (process.stderr.strip().splitlines() or ["no message"])[-1]
                checks.append(Check(f"runs in a fresh process ({place})", False, last))
                continue
            checks += [
                Check(f"{entry['check']} ({place})", entry["ok"], entry["detail"]) for entry in json.loads(answer.read_text())
            ]
            if output.is_file():
                logits[blocked] = load_file(output)["logits"]
    if len(logits) == 2:
        difference = (logits[True] - logits[False]).abs().max().item()
        detail = "" if difference <= TOLERANCE else f"they differ by {difference:.1e}"
        checks.append(Check("same logits with and without the package", difference <= TOLERANCE, detail))
    return checks


@torch.no_grad()
def _against_base(folder: Path, converted: Any, base: str | None, ids: list[list[int]]) -> list[Check]:
    names = ("tensors outside the layers are the base's, bit for bit", "reverting every layer gives the base's logits exactly")
    try:
        original = original_of(folder, converted, base)
    except InputError as error:
        if base is not None:
            raise
        return [Check(name, None, str(error)) for name in names]
    different = same_outside_layers(converted, original)
    outside = Check(names[0], different is None, f"{different} differs" if different else "")
    reverted = surgery.revert(converted, original, list(converted.mxd_layers()))
    tokens = torch.tensor(ids)
    same = reverted(input_ids=tokens).logits.equal(original(input_ids=tokens).logits)
    return [outside, Check(names[1], same, "" if same else "they differ")]
