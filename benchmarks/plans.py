"""What `plan` says of the recipes for models on the Hub, as a table.

    python benchmarks/plans.py [--recipe smollm2-360m]

No weights are needed: each base is a config of the model's published sizes, in a temporary folder. Hours on this machine are measured by
`plan`, with evaluation. Hours on an H100 are the work of training divided by the rate that a training step of ours reached there, which
grows with the width (benchmarks/RESULTS.md, 2026-11-26). A recipe that has not been run says so in its second line.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from runs import ROOT, plan

_LLAMA = {"model_type": "llama", "max_position_embeddings": 8192, "hidden_act": "silu", "tie_word_embeddings": True}
_GEMMA = {"model_type": "gemma3_text", "head_dim": 256, "num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 262_144}
_NEOX = {"model_type": "gpt_neox", "max_position_embeddings": 2048, "hidden_act": "gelu", "vocab_size": 50_304}


def _sizes(width: int, mlp: int, layers: int, heads: int, groups: int, vocabulary: int) -> dict[str, Any]:
    """Return the keys of a config of the Llama family."""
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
    }


def _neox(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        **_NEOX,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


GPT2: dict[str, Any] = {"model_type": "gpt2"}
CONFIGS: dict[str, dict[str, Any]] = {
    "smollm2-135m": {**_LLAMA, **_sizes(576, 1536, 30, 9, 3, 49_152)},
    "smollm2-360m": {**_LLAMA, **_sizes(960, 2560, 32, 15, 5, 49_152)},
    "smollm2-1.7b": {**_LLAMA, **_sizes(2048, 8192, 24, 32, 32, 49_152)},
    "qwen3-0.6b": {"model_type": "qwen3", "head_dim": 128, "tie_word_embeddings": True, **_sizes(1024, 3072, 28, 16, 8, 151_936)},
    "llama-3.2-1b": {**_LLAMA, **_sizes(2048, 8192, 16, 32, 8, 128_256)},
    "gemma-3-270m": {**_GEMMA, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18},
    "gemma-3-1b": {**_GEMMA, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26},
    "pythia-160m": _neox(768, 12, 12),
    "gpt2-all-layers": GPT2,
    "gpt2-paper": GPT2,
    "pythia-410m-paper": _neox(1024, 24, 16),
    "pythia-1.4b-paper": _neox(2048, 24, 16),
    "llama-3.2-3b-paper": {**_LLAMA, **_sizes(3072, 8192, 28, 24, 8, 128_256), "head_dim": 128},
}
# width and FLOP/s of a training step on one H100: 56.9 MFLOP per token, 2,048 tokens in 6.7 ms; 882 MFLOP, 4,096 tokens in 24.1 ms
H100 = ((768, 17.4e12), (3072, 150e12))


def h100_rate(width: int) -> float:
    """Return the FLOP/s of a layer of a width, by a power law through both measured widths."""
    (narrow, slow), (wide, fast) = H100
    power = math.log(fast / slow) / math.log(wide / narrow)
    return slow * (width / narrow) ** power


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", choices=CONFIGS, help="default: all")
    arguments = parser.parse_args()
    print("| recipe | layers | tokens, million | parameters, million | memory, GiB | hours here | hours on an H100 | |")
    print("|---|---|---|---|---|---|---|---|")
    for name in arguments.recipe or CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(CONFIGS[name]))
            _row(name, plan(str(ROOT / "recipes" / f"{name}.yaml"), base__model=folder))


def _row(name: str, made: dict[str, Any]) -> None:
    path = ROOT / "recipes" / f"{name}.yaml"
    layers = made["layers"]
    work = made["flops_per_token"] * made["tokens"]
    cells = [
        f"[`{name}`](../../recipes/{name}.yaml)",
        "all" if made["recipe"]["layers"] == "all" else ", ".join(str(layer["index"]) for layer in layers),
        f"{made['tokens'] / 1e6:,.0f}",
        f"{made['base_parameters'] / 1e6:,.0f} > {made['converted_parameters'] / 1e6:,.0f}",
        f"{made['memory_bytes']['peak'] / 2**30:.1f}",
        f"{made['speed']['seconds'] / 3600:,.1f}" if made["speed"] else "too large",
        f"{work / h100_rate(layers[0]['d_in']) / 3600:,.2g}",
        "not run yet" if "Not run yet." in path.read_text().splitlines()[1] else "run",
    ]
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
