"""The memory and time that `plan` predicts, against the run itself.

    python benchmarks/memory.py [--case quickstart --case stories260k]

Memory is the peak resident size of the process; time is that of the whole run, from the start of the interpreter to the end of the evaluation.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from runs import ROOT, SHARED, plan, run

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "quickstart": ("quickstart", {}),
    "quickstart, bf16 moments, one layer per pass": (
        "quickstart",
        {"train__moments": "bf16", "train__memory_gib": 0.6, "train__joint": 0.0},
    ),
    "quickstart, 64 x, batches of 4,096": ("quickstart", {"layer__expansion": 64, "train__batch_tokens": 4096}),
    "quickstart, batches of 16,384": ("quickstart", {"train__batch_tokens": 16_384}),
    "quickstart, batches of 65,536": ("quickstart", {"train__batch_tokens": 65_536, "data__tokens": 400_000}),
    "stories260k": ("stories260k", {}),
    "prose-neox, K = 8": (
        "stories260k",
        {
            "base__model": str(SHARED / "models" / "prose-neox"),
            "data__train__path": str(SHARED / "data" / "prose.jsonl.gz"),
            "data__tokens": 150_000,
            "data__eval__tokens": 16_384,
            "layer__k": 8,
            "layer__experts": "auto",
        },
    ),
}


WIDE = "GPT-2's width, two layers, random base"  # 38 million parameters per layer


def _wide_base(folder: Path) -> dict[str, Any]:
    """A random model of GPT-2's width with the quickstart's tokenizer, and the settings that convert it."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "quickstart-lm")
    config = GPT2Config(
        vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=None, n_embd=768, n_layer=2, n_head=12, n_positions=256
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    keys = {"base__model": str(folder), "layer__hidden": None, "layer__experts": 21_490, "layer__k": 32, "data__tokens": 20_000}
    return {**keys, "train__batch_tokens": 2048, "data__eval__tokens": 2048}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=[*CASES, WIDE], help="default: all whose models are there")
    arguments = parser.parse_args()
    print("| run | peak MiB: plan | real | plan / real | seconds: plan | real | plan / real |\n|---|---|---|---|---|---|---|")
    there = [name for name in CASES if name.startswith("quickstart") or SHARED.is_dir()]
    for name in arguments.case or [*there, WIDE]:
        with tempfile.TemporaryDirectory() as folder:
            recipe, settings = CASES[name] if name in CASES else ("quickstart", _wide_base(Path(folder) / "base"))
            said = plan(recipe, **settings)
            done = run(recipe, Path(folder) / "out", **settings)
        memory, seconds = said["memory_bytes"]["peak"], said["speed"]["seconds"]
        cost = done.report["cost"]
        real = cost["peak_gpu_bytes"] or cost["peak_rss_bytes"]
        print(f"| {name} | {memory / 2**20:,.0f} | {real / 2**20:,.0f} | {memory / real:.2f} ", end="")
        print(f"| {seconds:.0f} | {done.seconds:.0f} | {seconds / done.seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
