"""A tiny base model, its conversion, a delta, an ONNX folder and texts, made once in a folder."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from robustness import server
from robustness.programs import brief_program

ROOT = Path(__file__).resolve().parent.parent.parent
QUICKSTART = ROOT / "examples" / "quickstart-lm"
CARD = (
    "---\nlicense: mit\nlanguage: [en]\nlicense_name: mine\ntags: [tiny]\n---\n# A tiny model\nSome *words*, and a [link](x).\n"
)


@dataclass(frozen=True)
class Fixtures:
    """Folders, which nobody may change: commands run on copies."""

    root: Path

    @property
    def base(self) -> Path:
        return self.root / "tiny"

    @property
    def checkpoint(self) -> Path:
        return self.root / "converted"

    @property
    def delta(self) -> Path:
        return self.root / "delta"

    @property
    def onnx(self) -> Path:
        return self.root / "onnx"

    @property
    def text(self) -> Path:
        return self.root / "text.jsonl"

    @property
    def labelled(self) -> Path:
        return self.root / "labelled.jsonl"

    @property
    def size(self) -> int:
        """Bytes of the checkpoint."""
        return sum(path.stat().st_size for path in self.checkpoint.rglob("*") if path.is_file())

    @property
    def largest(self) -> int:
        """Bytes of the largest file of the base, which is the largest of all."""
        return max(path.stat().st_size for path in self.base.iterdir())

    def recipe(self, output: str = "out", **sections: Any) -> dict[str, Any]:
        """Return a small recipe; sections replace or add keys."""
        recipe: dict[str, Any] = {
            "base": {"model": str(self.base)},
            "data": {"train": {"path": str(self.text)}, "eval": {"tokens": 512}, "context": 32, "tokens": 4096},
            "layers": [0, 2],
            "layer": {"k": 4, "experts": 24},
            "train": {"batch_tokens": 256, "checkpoint_every": 4, "log_every": 4, "device": "cpu"},
            "output": {"dir": output},
        }
        for section, content in sections.items():
            recipe[section] = {**recipe[section], **content} if isinstance(content, dict) else content
        return recipe


def make(root: Path, onnx: bool = True) -> Fixtures:
    """Make everything, and import in this process what the commands have imported by then."""
    made = Fixtures(root)
    server.preload()
    _texts(made)
    _base(made.base)
    (root / "recipe.yaml").write_text(yaml.safe_dump(made.recipe(str(made.checkpoint))))
    commands = [
        ("run", "recipe.yaml"),
        ("delta", "converted", "delta"),
        *(
            [("export-onnx", "converted", "onnx", "--data", "text.jsonl", "--tokens", "64", "--expert-outputs", "--steering")]
            * onnx
        ),
    ]
    for command in commands:
        warm(server.Work(command, root, brief_program))
    return made


def warm(work: server.Work) -> None:
    """Do work that must go well, and import here what it imported."""
    outcome, modules = server.modules_of(work)
    if outcome.status not in (0, 1):
        raise SystemExit(
            f"{' '.join(work.arguments)} ended with {outcome.status}: {outcome.err.decode(errors='replace')[-2000:]}"
        )
    server.preload(modules)


def _texts(made: Fixtures) -> None:
    documents = [
        f"Document {i}. " + " ".join(f"The value {j * i % 97} is returned when index {j} is given." for j in range(12))
        for i in range(60)
    ]
    made.text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    kinds = [("even" if number % 2 else "odd", text) for number, text in enumerate(documents)]
    made.labelled.write_text("".join(json.dumps({"text": text, "label": kind}) + "\n" for kind, text in kinds))


def _base(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config

    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "vocab_size": 2048}
    model = AutoModelForCausalLM.from_config(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(QUICKSTART / name, folder / name)
    (folder / "README.md").write_text(CARD)
