"""Checks that every converted model passes if its base does, for every family of the table.

Each check takes the folder of the base or of the converted model, and returns the problem, or None.
`tests/families/test_families.py` runs them; `python tests/support/conformance.py` writes docs/families.md.
"""

import inspect
import json
import re
import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from project import QUICKSTART, ROOT
from safetensors.torch import load_file
from small_runs import documents, small_recipe
from tiny_models import VOCABULARY, save_tiny

from mxd_convert.base_model import swap
from mxd_convert.base_model.checks import quiet
from mxd_convert.base_model.families import ARCHITECTURES, architecture_of, find_sites
from mxd_convert.base_model.load import auto_class, load_base, load_tokenizer
from mxd_convert.checkpoint.read import load_checkpoint
from mxd_convert.commands.export_onnx import export_onnx
from mxd_convert.layers import MxD
from mxd_convert.recipe.schema import Base

IDS = torch.randint(1, VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(1))
NEW = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
Check = Callable[[Path], str | None]


def load(folder: Path, **options: Any) -> Any:
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    return auto_class(model_type).from_pretrained(folder, **options).eval()


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS, **more: Any) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False, **more).logits


def differs(ours: torch.Tensor, theirs: torch.Tensor, limit: float = 1e-5, relative: bool = True) -> str | None:
    """Return how far logits differ beyond the limit, or None. relative: divide by the largest logit if it exceeds one."""
    if ours.shape != theirs.shape:
        return f"shapes {tuple(ours.shape)} and {tuple(theirs.shape)}"
    most = theirs.float().abs().max().clamp_min(1) if relative else 1.0
    worst = float((ours.float() - theirs.float()).abs().max() / most)
    return None if worst <= limit else f"differs by {worst:.1e}"


def saves(folder: Path) -> str | None:
    """Save, load and save again: the same bytes."""
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        load(folder).save_pretrained(first)
        load(Path(first)).save_pretrained(second)
        names = {path.name for path in Path(first).iterdir()} | {path.name for path in Path(second).iterdir()}
        for name in sorted(names):
            if (Path(first) / name).read_bytes() != (Path(second) / name).read_bytes():
                return f"{name} differs"
        if (Path(first) / "model.safetensors").read_bytes() != (folder / "model.safetensors").read_bytes():
            return "the weights are not those that were loaded"
    return None


def shards(folder: Path) -> str | None:
    model = load(folder)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch, max_shard_size=30_000)
        if len(list(Path(scratch).glob("model-*.safetensors"))) < 3:
            return "not sharded"
        return differs(logits(load(Path(scratch))), logits(model), 0.0)


def caches(kind: str) -> Check:
    def check(folder: Path) -> str | None:
        model = load(folder)
        options = {"cache_implementation": "static", "disable_compile": True} if kind == "static" else {}
        cached = model.generate(IDS[:2, :30], **NEW, **options)
        plain = model.generate(IDS[:2, :30], **NEW, use_cache=False)
        if not cached.equal(plain):
            return "another text than without a cache"
        whole = logits(model, plain)
        with torch.no_grad():
            past = model(input_ids=plain[:, :35], use_cache=True).past_key_values
            step = model(input_ids=plain[:, 35:], past_key_values=past, use_cache=True).logits
        return differs(step, whole[:, 35:]) if kind == "dynamic" else None

    return check


def pads(folder: Path) -> str | None:
    """Left padding changes neither text nor logits."""
    model, ids = load(folder), IDS[:2, :20].clone()
    mask = torch.ones_like(ids)
    ids[0, :7], mask[0, :7] = 0, 0
    batch = model.generate(ids, attention_mask=mask, **NEW)
    alone = model.generate(ids[:1, 7:], **NEW)
    if not batch[0, 7:].equal(alone[0]):
        return "another text than alone"
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    more = {"position_ids": positions} if "position_ids" in inspect.signature(model.forward).parameters else {}
    return differs(logits(model, ids, attention_mask=mask, **more)[0, 7:], logits(model, ids[:1, 7:])[0])


def beams(folder: Path) -> str | None:
    model = load(folder)
    cached = model.generate(IDS[:2, :20], **NEW, num_beams=3)
    return (
        None
        if cached.equal(model.generate(IDS[:2, :20], **NEW, num_beams=3, use_cache=False))
        else "another text than without a cache"
    )


def bfloat16(folder: Path) -> str | None:
    ours = logits(load(folder, dtype=torch.bfloat16))
    if ours.dtype != torch.bfloat16 or not torch.isfinite(ours).all():
        return f"logits of {ours.dtype}, or not finite"
    # all but a few: where two gates are next to a tie, bfloat16 may choose the other expert
    apart = (ours.float() - logits(load(folder))).abs().quantile(0.95).item()
    return None if apart <= 0.1 else f"differs by {apart:.1e}"


def checkpoints(folder: Path) -> str | None:
    """Gradient checkpointing keeps the gradient of every parameter."""

    def gradients(use: bool) -> dict[str, torch.Tensor]:
        model = load(folder).requires_grad_(True)
        torch.manual_seed(0)  # of dropout
        model.train()
        if use:
            model.gradient_checkpointing_enable()
            if not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
                raise AssertionError("not enabled")
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        text = {name: parameter for name, parameter in model.named_parameters() if not re.search("vision|multi_modal", name)}
        found = {name: parameter.grad for name, parameter in text.items()}
        if missing := [name for name, gradient in found.items() if gradient is None]:
            raise AssertionError(f"no gradient for {missing[0]}")
        return found

    plain, checkpointed = gradients(False), gradients(True)
    sizes = {name: gradient.abs().max().clamp_min(1e-3) for name, gradient in plain.items()}
    worst = max(((plain[name] - checkpointed[name]).abs().max() / size).item() for name, size in sizes.items())
    return None if worst <= 1e-4 else f"gradients differ by {worst:.1e}"


def compiles(folder: Path) -> str | None:
    """torch.compile(fullgraph=True) gives one graph and the same logits."""
    torch._dynamo.reset()
    model = load(folder)
    return differs(logits(torch.compile(model, fullgraph=True, backend="eager")), logits(model))


def offloads(folder: Path) -> str | None:
    """Layers on the CPU and on the disk give the same logits."""
    plain = load(folder)
    layer = next(path for path, module in plain.named_modules() if path.endswith(".1")).rpartition(".")[0]
    with tempfile.TemporaryDirectory() as scratch:
        whole = {name.rpartition(".")[0]: "cpu" for name in plain.state_dict()}
        within = {name: device for name, device in whole.items() if not name.startswith(f"{layer}.")}
        devices = {**within, f"{layer}.0": "cpu", f"{layer}.1": "disk"}
        spread = load(folder, device_map=devices, offload_folder=scratch)
        if not any(parameter.device.type == "meta" for parameter in spread.parameters()):
            return "nothing is on the disk"
        return differs(logits(spread), logits(plain), 1e-6)


def ties(folder: Path) -> str | None:
    model = load(folder)
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tied, asked = inputs.data_ptr() == outputs.data_ptr(), model.config.tie_word_embeddings
    if tied != asked:
        return f"embeddings are {'' if tied else 'not '}tied, and config.json says {asked}"
    stored = [name for name, tensor in load_file(folder / "model.safetensors").items() if tensor.shape == inputs.shape]
    return None if len(stored) == (1 if tied else 2) else f"its file holds {', '.join(stored)}"


CHECKS: dict[str, Check] = {
    "save, load, save": saves,
    "sharded": shards,
    "dynamic cache": caches("dynamic"),
    "static cache": caches("static"),
    "left padding": pads,
    "beam search": beams,
    "bfloat16": bfloat16,
    "gradient checkpointing": checkpoints,
    "compile, fullgraph": compiles,
    "CPU and disk": offloads,
    "tied weights": ties,
}
"""What base and converted model are both asked."""


# --- checks of converted models only: (folder of the base, folder of the converted model) -> the problem, or None ------------------------


def linear_weights(projection: Any) -> tuple[torch.Tensor, torch.Tensor]:
    weight = projection.weight.T if type(projection).__name__ == "Conv1D" else projection.weight
    bias = projection.bias if projection.bias is not None else torch.zeros(weight.shape[0])
    return weight, bias


@torch.no_grad()
def constant_gain_layer(base: Any, site: Any, k: int = 4, n_experts: int = 12) -> MxD:
    """Return an MxD with the MLP's weights in encoder and decoder, whose gain is one for any active experts."""
    row = architecture_of(base.config)
    mlp = base.get_submodule(row.mlp.format(i=site.index))
    layer = MxD(site.d_in, site.d_hidden, site.d_out, n_experts, k, activation=site.activation, glu=site.glu)
    layer.gate.weight.zero_()
    layer.gate.bias.fill_(1.0)
    layer.experts.fill_(1.0 / k)
    parts = {name: linear_weights(mlp.get_submodule(name)) for name in (row.up, row.gate, row.down) if name is not None}
    if row.gate == row.up:  # both in one matrix, the gate's half first
        (gate, up), (gate_bias, up_bias) = (part.chunk(2) for part in parts[row.up])
        encoder, encoder_gate = (up, up_bias), (gate, gate_bias)
    else:
        encoder, encoder_gate = parts[row.up], parts.get(row.gate)
    for mine, theirs in ((layer.encoder, encoder), (layer.encoder_gate, encoder_gate)):
        if mine is not None:
            mine.weight.copy_(theirs[0])
            mine.bias.copy_(theirs[1])
    layer.decoder.weight.copy_(parts[row.down][0])
    layer.output_bias.copy_(parts[row.down][1])
    return layer


def identity(base_folder: Path, _: Path) -> str | None:
    """The original weights with a constant gain give the base's logits, after saving and loading; zeroed MLPs do not."""
    base = load_base(Base(model=str(base_folder)))
    sites = find_sites(base, base.config, range(base.config.get_text_config().num_hidden_layers))
    with tempfile.TemporaryDirectory() as scratch:
        swap.insert_layers(base, {site.index: constant_gain_layer(base, site) for site in sites}).save_pretrained(scratch)
        problem = differs(logits(load_checkpoint(scratch)), logits(base), relative=False)
    with swap.replaced_mlps(base, sites, {site.index: swap.Constant(torch.zeros(site.d_out)) for site in sites}):
        if differs(logits(base), logits(load(base_folder)), 1e-3) is None:
            return "the MLPs do not matter"
    return problem


def reverts(base_folder: Path, folder: Path) -> str | None:
    """Reverting all layers restores the base bit for bit, including its class."""
    base = load_base(Base(model=str(base_folder)), dtype="auto")
    converted = load_checkpoint(folder)
    reverted = swap.remove_layers(converted, base, list(converted.mxd_layers()))
    if type(reverted) is not type(base):
        return f"a {type(reverted).__name__}"
    return differs(logits(reverted), logits(base), 0.0)


def alone(_: Path, folder: Path) -> str | None:
    """A fresh process without this package gives the same logits with trust_remote_code."""
    with tempfile.TemporaryDirectory() as scratch:
        request, answer, output = (Path(scratch) / name for name in ("request.json", "answer.json", "logits.pt"))
        content = {"checkpoint": str(folder), "input_ids": IDS.tolist(), "answer": str(answer), "logits": str(output)}
        content |= {"path": [entry for entry in sys.path if entry], "trusted": True, "tokenizer_trusted": True}
        request.write_text(json.dumps({**content, "blocked": True}))
        environment = {
            "HF_MODULES_CACHE": str(Path(scratch) / "modules"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PATH": "",
        }
        script = ROOT / "mxd_convert" / "checkpoint" / "fresh_process.py"
        done = subprocess.run(
            [sys.executable, "-I", str(script), str(request)],
            capture_output=True,
            text=True,
            env=environment,
            cwd=scratch,
            check=False,
        )
        if done.returncode != 0:
            return (done.stderr.strip().splitlines() or ["no message"])[-1]
        wrong = [check for check in json.loads(answer.read_text()) if not check["ok"]]
        if wrong:
            return f"{wrong[0]['check']}: {wrong[0]['detail']}"
        return differs(load_file(output)["logits"], logits(load(folder)), relative=False)


def exports(_: Path, folder: Path) -> str | None:
    """The gate of export-onnx passes, including steering."""
    with tempfile.TemporaryDirectory() as scratch:
        text = ROOT / "examples" / "python-docs.jsonl.gz"
        done = export_onnx(folder, Path(scratch) / "out", expert_outputs=True, steering=True, data=text, tokens=512, quiet=True)
        return done.failures[0] if done.failures else None


OWN: dict[str, Callable[[Path, Path], str | None]] = {
    "identity": identity,
    "remote code": alone,
    "revert": reverts,
    "ONNX": exports,
}


# --- the models and the table -----------------------------------------------------------------------------------------------------

SLOW = ("compile, fullgraph", "remote code", "ONNX")
NAMES = {
    "identity": "the original weights under a constant gain give the base's logits, within 1e-5, after saving and loading; zeroed MLPs do not",
    "remote code": "in a fresh process without this package, `trust_remote_code=True`: loads, generates, saves, trains; the same logits",
    "save, load, save": "the same bytes, the checkpoint's own code included",
    "sharded": "saved in shards and loaded again: the same logits",
    "dynamic cache": "greedy text is the text without a cache, logits within 1e-5",
    "static cache": "greedy text is the text without a cache",
    "left padding": "text and logits of a padded row are those of the row alone",
    "beam search": "with a cache and without: the same text",
    "bfloat16": "loads and runs in bfloat16",
    "gradient checkpointing": "the gradient of every parameter is the one without",
    "compile, fullgraph": "`torch.compile(fullgraph=True)`: one graph, the same logits",
    "CPU and disk": "`device_map` with layers on the CPU and on the disk: the same logits",
    "tied weights": "embeddings and head are one matrix where the config says so, stored once",
    "revert": "with its MLPs back: the base's class, the base's logits to the bit",
    "ONNX": "`export-onnx` passes its own gate: onnxruntime against PyTorch, experts and steering included",
}
"""What each check asks, in the order of the table."""

PASSED, BASE_FAILS = "yes", "the base can't"


def make(family: str, scratch: Path) -> tuple[Path, Path]:
    """Return (a tiny base, its conversion by the whole pipeline); the second of two layers is converted."""
    from mxd_convert import convert

    base = save_tiny(family, scratch / "base", load_tokenizer(str(QUICKSTART)))
    text = scratch / "text.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents()))
    convert(small_recipe(base, text, scratch / "converted", layers=[1]), quiet=True)
    return base, scratch / "converted"


def tried(run: Callable[[], str | None]) -> str | None:
    try:
        return run()
    except Exception as error:  # any exception is a problem of the model
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:200]}"


def outcome(check: str, base: Path, converted: Path) -> str:
    """Return the cell of the table: PASSED, BASE_FAILS, or the problem of the converted model."""
    if check in OWN:
        return tried(lambda: OWN[check](base, converted)) or PASSED
    if tried(lambda: CHECKS[check](base)) is not None:
        return BASE_FAILS
    return tried(lambda: CHECKS[check](converted)) or PASSED


def page(cells: dict[tuple[str, str], str]) -> str:
    """Return docs/families.md, with all lines but those of the table wrapped. cells: by family and check."""
    lines = [
        "# Families",
        "",
        "Each family was tried with a tiny random model: one of two layers is converted by the whole pipeline. `make families` writes this"
        " table, and `tests/families/test_families.py` makes every cell again.",
        "",
        f"| model_type | MLP | {' | '.join(NAMES)} |",
        "|---|---|" + "---|" * len(NAMES),
    ]
    for family, row in ARCHITECTURES.items():
        parts = [row.gate, row.up, row.down] if row.gate not in (None, row.up) else [row.up, row.down]
        lines.append(f"| `{family}` | `{row.mlp}`: {', '.join(parts)} | {' | '.join(cells[family, check] for check in NAMES)} |")
    lines += ["", "What each column says:", ""]
    lines += [f"- **{name}**: {what}" for name, what in NAMES.items()]
    lines += [
        "",
        f"*{BASE_FAILS}*: transformers' own class of the family does not pass that check either. Variants within families, such as Falcon's"
        " three arrangements of attention and MLP, are in `tests/families/test_families.py`.",
        "",
        "A family that is not here: [how to add one](add-a-family.md).",
    ]
    pieces = [
        [line] if line[:1] in ("|", "") else textwrap.wrap(line, 100, subsequent_indent="  " * (line[0] == "-")) for line in lines
    ]
    return "".join(f"{piece}\n" for each in pieces for piece in each)


def main() -> None:
    warnings.simplefilter("ignore")
    cells = {}
    for family in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as scratch:
            base, converted = make(family, Path(scratch))
            for check in NAMES:
                with quiet():
                    cells[family, check] = outcome(check, base, converted)
                print(f"{family}: {check}: {cells[family, check]}", file=sys.stderr, flush=True)
    (ROOT / "docs" / "families.md").write_text(page(cells), encoding="utf-8")


if __name__ == "__main__":
    main()
