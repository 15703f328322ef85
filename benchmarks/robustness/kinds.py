"""The kinds of input that benchmarks/fuzz.py makes: a folder with a damaged file, and a command that reads it."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from robustness import mutations, tensors
from robustness.fixtures import Fixtures
from robustness.programs import brief_program, generate_onnx

PROMPT = ("--prompt", "The value 41 is")
TOKENS = ("--tokens", "64")
LONG_NAME = 4000  # a command-line argument holds no more of a hostile string


@dataclass(frozen=True)
class Kind:
    """make: (fixtures, empty folder, source of chance) -> arguments of the command that is run there."""

    count: int
    make: Callable[[Fixtures, Path, random.Random], list[str]]
    function: Callable[[list[str]], int] | None = None


def _copied(source: Path, folder: Path, name: str = "x") -> Path:
    return Path(shutil.copytree(source, folder / name))


def _maybe_json(command: list[str], draw: random.Random) -> list[str]:
    return [*command, "--json"] if draw.random() < 0.4 else command


def _chosen(commands: list[tuple[int, list[str]]], draw: random.Random) -> list[str]:
    return _maybe_json(draw.choices([command for _, command in commands], [share for share, _ in commands])[0], draw)


# --- recipes and settings ---------------------------------------------------------------------------------------------------------


def _whole_recipe(made: Fixtures) -> dict[str, object]:
    """A recipe with every key."""
    from mxd_convert.recipe.schema import Recipe

    return {**Recipe(**made.recipe()).model_dump(mode="json"), "layers": "0-2", "output": {"dir": "out"}}


def recipe(made: Fixtures, folder: Path, draw: random.Random) -> list[str]:
    content = _whole_recipe(made) if draw.random() < 0.5 else made.recipe()
    text = yaml.safe_dump(content)
    way = draw.random()
    if way < 0.55:
        file = mutations.to_json(mutations.changed(content, draw))  # JSON is YAML
    elif way < 0.8:
        file = mutations.yaml_file(text, draw)
    else:
        file = mutations.raw(text.encode(), draw)
    (folder / "recipe.yaml").write_bytes(file)
    return _maybe_json(["plan", "recipe.yaml"], draw)


def _keys(content: object, before: str = "") -> list[str]:
    if not isinstance(content, dict):
        return [before]
    return [
        *([before] if before else []),
        *(key for name, value in content.items() for key in _keys(value, f"{before}.{name}".lstrip("."))),
    ]


def _as_argument(value: object) -> str:
    text = value if isinstance(value, str) else mutations.to_json(value).decode()
    return text.replace("\0", "").replace("\ud800", "\udcff")[:LONG_NAME]  # as a shell could give it


def settings(made: Fixtures, folder: Path, draw: random.Random) -> list[str]:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(made.recipe()))
    keys = _keys(_whole_recipe(made))
    command = ["plan", "recipe.yaml"]
    for _ in range(mutations.amount(draw)):
        key = draw.choice(keys)
        if draw.random() < 0.2:
            holder = {key: 0}
            mutations._rename(holder, key, draw)
            key = _as_argument(next(iter(holder)))
        value = draw.choice((_as_argument(mutations.hostile(draw)), draw.choice(mutations.YAML_VALUES)))
        text = f"{key}={value}"
        if draw.random() < 0.15:
            text = draw.choice(
                (key, f"={value}", f"{key}=", f"{key}=={value}", f".{text}", text.replace(".", ".."), f"{key}.x={value}", value)
            )
        command.append(f"--set={text.replace(chr(0), '')}")
    return _maybe_json(command, draw)


# --- files of a checkpoint ----------------------------------------------------------------------------------------------------------


def _rewrite(path: Path, change: Callable[[bytes, random.Random], bytes], draw: random.Random) -> None:
    path.write_bytes(change(path.read_bytes(), draw))


def _reading(made: Fixtures) -> list[tuple[int, list[str]]]:
    return [
        (40, ["generate", "x", *PROMPT, "--max-new-tokens", "2"]),
        (25, ["inspect", "x", *PROMPT]),
        (20, ["eval", "x", "--data", str(made.text), *TOKENS]),
        (15, ["verify", "x", "--provenance"]),
    ]


def config(made: Fixtures, folder: Path, draw: random.Random) -> list[str]:
    _rewrite(_copied(made.checkpoint, folder) / "config.json", mutations.json_file, draw)
    return _chosen(_reading(made), draw)


def _reporting(made: Fixtures) -> list[tuple[int, list[str]]]:
    good = str(made.checkpoint)
    return [
        (30, ["compare", "x", good]),
        (10, ["compare", good, "x"]),
        (15, ["delta", "x", "out"]),
        (15, ["edit", "x", "--ablate", "0:1", "-o", "out"]),
        (10, ["verify", "x", "--provenance"]),
        (8, ["push", "x", "alice/x", "--dry-run"]),
        (6, ["eval", "x", "--data", str(made.text), *TOKENS, "--record"]),
        (5, ["revert", "x", "--layers", "2", "-o", "out"]),
        (1, ["export-onnx", "x", "out", "--data", str(made.text), *TOKENS]),
    ]


def report(made: Fixtures, folder: Path, draw: random.Random) -> list[str]:
    _rewrite(_copied(made.checkpoint, folder) / "mxd_report.json", mutations.json_file, draw)
    return _chosen(_reporting(made), draw)


def card(made: Fixtures, folder: Path, draw: random.Random) -> list[str]:
    """README.md of the checkpoint, or of the base that its card is made of."""
    of_base = draw.random() < 0.5
    copied = _copied(made.checkpoint, folder)
    readme = (_copied(made.base, folder, "base") if of_base else copied) / "README.md"
    text = readme.read_text()
    front, body = text[4:].split("\n---", 1)
    way = draw.random()
    if way < 0.4:
        content = mutations.to_json(mutations.changed(yaml.safe_load(front), draw))
        readme.write_bytes(b"---\n" + content + b"\n---" + body.encode())
    elif way < 0.65:
        readme.write_bytes(b"---\n" + mutations.yaml_file(front, draw) + b"\n---" + body.encode())
    elif way < 0.7:
        readme.write_bytes(b"---\n" + mutations.bomb() + b"---\n# x\n")
    else:
        _rewrite(readme, mutations.raw, draw)
    base = ["--base", "base"] if of_base else []
    evaluated = ["eval", "x", "--data", str(made.text), *TOKENS, "--record", *base]
    commands = [
        (30, ["edit", "x", "--ablate", "0:1", "-o", "out", *base]),
        (25, ["delta", "x", "out", *base]),
        (20, ["push", "x", "alice/x", "--dry-run", *base]),
        (15, evaluated),
        (10, ["revert", "x", "--layers", "2", "-o", "out", *base]),
    ]
    return _chosen(commands, draw)


def labels(made: Fixtures, folder: Path, draw: random.Random) -> list[str]:
    entries = [{"layer": layer, "expert": 1, "text": f"words {layer}", "author": "mara"} for layer in (0, 0, 2)]
    for number, entry in enumerate(entries):
        entry["expert"] = number
    content = mutations.json_file(json.dumps(entries, indent=2).encode(), draw)
    copied = _copied(made.checkpoint, folder)
    (folder / "labels.json").write_bytes(content)
    if draw.random() < 0.85:
        (copied / "mxd_labels.json").write_bytes(content)
    commands = [
        (30, ["label", "x"]),
        (15, ["label", "x", "0:3", f"{mutations.ESCAPE} [/x]", "--author", "ann"]),
        (20, ["label", "x", "--file", "labels.json"]),
        (20, ["inspect", "x", *PROMPT]),
        (10, ["dashboard", "x", "--data", str(made.text), "--tokens", "128", "-o", "out"]),
        (5, ["delta", "x", "out"]),
    ]
    return _chosen(commands, draw)


SIDE = (
    "recipe.yaml",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "mxd_local.json",
)


def side(made: Fixtures, folder: Path, draw: random.Random) -> list[str]:
    copied, name = _copied(made.checkpoint, folder), draw.choice(SIDE)
    if name.endswith("index.json"):
        _shard(copied)
    if name.endswith(".yaml"):
        text = (copied / name).read_text()
        files = (
            lambda: mutations.to_json(mutations.changed(yaml.safe_load(text), draw)),
            lambda: mutations.yaml_file(text, draw),
            lambda: mutations.raw(text.encode(), draw),
            mutations.bomb,
        )
        (copied / name).write_bytes(draw.choices(files, (45, 30, 20, 5))[0]())
    else:
        _rewrite(copied / name, mutations.json_file, draw)
    return _chosen([*_reading(made), *_reporting(made)] if name == "recipe.yaml" or draw.random() < 0.3 else _reading(made), draw)


def _shard(folder: Path) -> None:
    """Two shards and an index, as large checkpoints have them."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {name: f"model-{1 + (number % 2):05}-of-00002.safetensors" for number, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, folder / file, metadata={"format": "pt"})
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=2)
    )


def weights(made: Fixtures, folder: Path, draw: random.Random) -> list[str]:
    _rewrite(_copied(made.checkpoint, folder) / "model.safetensors", tensors.safetensors_file, draw)
    export = ["export-onnx", "x", "out", "--data", str(made.text), *TOKENS]
    return _chosen(
        [*_reading(made), (15, export), (8, ["edit", "x", "--ablate", "0:1", "-o", "out"]), (8, ["delta", "x", "out"])], draw
    )


# --- other folders ----------------------------------------------------------------------------------------------------------------


def delta(made: Fixtures, folder: Path, draw: random.Random) -> list[str]:
    copied = _copied(made.delta, folder)
    files = sorted(
        path for path in copied.rglob("*") if path.suffix in (".json", ".safetensors") and path.name != "tokenizer.json"
    )
    path = copied / "mxd_delta.json" if draw.random() < 0.45 else draw.choice(files)
    _rewrite(path, tensors.safetensors_file if path.suffix == ".safetensors" else mutations.json_file, draw)
    commands = [
        (50, ["apply", "x", "out"]),
        (20, ["apply", "x", "out", "--base", str(made.base)]),
        (20, ["verify", "x", "--provenance"]),
        (10, ["push", "x", "alice/x", "--dry-run"]),
    ]
    return _chosen(commands, draw)


def onnx(made: Fixtures, folder: Path, draw: random.Random) -> list[str]:
    copied = _copied(made.onnx, folder)
    files = sorted(
        path for path in copied.rglob("*") if path.suffix in (".json", ".onnx") and not path.name.endswith("report.json")
    )
    path = draw.choice([file for file in files if file.suffix == ".onnx"]) if draw.random() < 0.4 else draw.choice(files)
    _rewrite(path, _onnx_file if path.suffix == ".onnx" else mutations.json_file, draw)
    return ["x"]


def _onnx_file(content: bytes, draw: random.Random) -> bytes:
    """A graph whose bytes, or whose description of its layers, are changed."""
    import onnx

    if draw.random() < 0.4:
        return mutations.raw(content, draw)
    model = onnx.load_from_string(content)
    for entry in model.metadata_props:
        if entry.key == "mxd":
            entry.value = mutations.json_file(entry.value.encode(), draw)[:10_000].decode("utf-8", "replace")
    if draw.random() < 0.3:
        model.graph.input[0].name = draw.choice(("x", mutations.ESCAPE, "attention_mask"))
    return bytes(model.SerializeToString())


KINDS: dict[str, Kind] = {
    "recipe": Kind(2000, recipe),
    "set": Kind(2000, settings),
    "config": Kind(2000, config, brief_program),
    "report": Kind(2000, report, brief_program),
    "card": Kind(2000, card, brief_program),
    "labels": Kind(2000, labels, brief_program),
    "side": Kind(1000, side, brief_program),
    "delta": Kind(200, delta, brief_program),
    "onnx": Kind(200, onnx, generate_onnx),
    "weights": Kind(200, weights, brief_program),
}
