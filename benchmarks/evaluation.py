"""The cost of an evaluation: prefixes and batched variants against one whole forward per variant, on the same tokens in one process.

    python benchmarks/evaluation.py [--shape smollm2-135m] [--tokens 2048]

The reference (tests/support/whole_passes.py) runs 5 + 6 L forwards of the whole text for L layers and takes no statistics, so it is faster
than the evaluation that it stands for. Models have random weights; only their shapes matter. The last column is the share of the time that
training on a million tokens takes by the recipe `fast`, as `mxd-convert plan` measures it in the same process.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mxd_convert.base_model.families import find_sites
from mxd_convert.base_model.swap import insert_layers
from mxd_convert.data.blocks import Blocks, TextInfo
from mxd_convert.evaluation.fidelity import evaluate_models
from mxd_convert.layers import LayerSpec, new_layer
from mxd_convert.plan.resolve import make_plan
from mxd_convert.plan.timing import measure_machine
from mxd_convert.recipe.load import load_recipe
from runs import ROOT

sys.path.insert(0, str(ROOT / "tests" / "support"))
import whole_passes

CONTEXT = 256
DOCUMENT = 300  # tokens of a document


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama, and of the layers that replace its MLPs."""

    width: int
    mlp: int
    layers: int
    heads: int
    groups: int
    vocabulary: int
    hidden: int
    k: int


SHAPES = {
    "stories260k": Shape(64, 172, 5, 8, 4, 512, hidden=43, k=8),
    "smollm2-135m": Shape(576, 1536, 30, 9, 3, 49_152, hidden=384, k=32),
}


def models_of(shape: Shape) -> tuple[LlamaForCausalLM, torch.nn.Module]:
    """A base model and its conversion in all layers, both random."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    base = LlamaForCausalLM(config).eval().requires_grad_(False)
    layers = {}
    for index in range(shape.layers):
        spec = LayerSpec("mxd", shape.width, shape.hidden, shape.width, 0, shape.k, "silu", glu=True).match_parameters(8)
        layers[index] = new_layer(spec, "paper")
        torch.nn.init.normal_(layers[index].decoder.weight, std=0.02)
    return base, insert_layers(base, layers)


def blocks_of(shape: Shape, tokens: int) -> Blocks:
    """Random tokens in documents of equal length."""
    ids = np.random.default_rng(0).integers(0, shape.vocabulary, (tokens // CONTEXT, CONTEXT))
    starts = np.arange(0, ids.size, DOCUMENT)
    return Blocks(ids, None, TextInfo("random", "0" * 64, ids.size, len(starts)), starts)


def training_seconds(base: LlamaForCausalLM, shape: Shape) -> float:
    """Seconds of training on a million tokens, as `mxd-convert plan` measures them."""
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        AutoTokenizer.from_pretrained(ROOT / "examples" / "quickstart-lm").save_pretrained(folder)
        text = ROOT / "examples" / "python-docs.jsonl.gz"
        recipe = load_recipe(
            {
                "base": {"model": folder},
                "data": {"train": {"path": str(text)}, "context": CONTEXT, "tokens": 1_000_000},
                "layer": {"k": shape.k, "expansion": 8, "hidden": shape.hidden},
                "output": {"dir": f"{folder}/out"},
            }
        )
        return measure_machine(make_plan(recipe)).training_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: all")
    parser.add_argument("--tokens", type=int, default=2048, help="held-out tokens")
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {arguments.tokens:,} held-out tokens in blocks of {CONTEXT}\n")
    print(
        "| shape | whole forwards | seconds | full passes | suffix passes | seconds | ratio | quick | of 1 M tokens of training |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in arguments.shape or SHAPES:
        shape = SHAPES[name]
        base, converted = models_of(shape)
        blocks = blocks_of(shape, arguments.tokens)
        sites = find_sites(base, base.config, list(range(shape.layers)))
        base(input_ids=blocks.take(slice(0, 1)))  # the first forward is slower
        start = time.perf_counter()
        whole_passes.evaluate(base, converted, {site.index: site.path for site in sites}, blocks, rows=1)
        before = time.perf_counter() - start
        cost = evaluate_models(base, converted, sites, blocks, quiet=True)["cost"]["evaluation"]
        quick = evaluate_models(base, converted, sites, blocks, quiet=True, quick=True)["cost"]["evaluation"]["seconds"]
        # an evaluation of 16,384 tokens, as of a recipe of a million
        share = cost["seconds"] / arguments.tokens * 16_384 / training_seconds(base, shape)
        print(
            f"| {name} | {5 + 6 * shape.layers} | {before:.1f} | {cost['full_passes']:.2f} | {cost['suffix_passes']} |"
            f" {cost['seconds']:.1f} | {before / cost['seconds']:.1f} | {quick:.1f} | {share:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
