"""The rise in cross-entropy against the number of converted layers: nested subsets of one conversion's layers, the others reverted.

    python benchmarks/subsets.py CHECKPOINT --data TEXT [--tokens 16384] [--sizes 1,5,10,20,30]

Layers are spread over the depth: the first is the middle one, and each next is the one farthest from those before. The last column is
the rise divided by the sum of the rises of these layers alone, from the checkpoint's report: above 1, errors amplify each other.
"""

import argparse
import tempfile
from pathlib import Path

from mxd_convert.base_model.families import find_sites
from mxd_convert.base_model.load import load_tokenizer
from mxd_convert.base_model.swap import remove_layers
from mxd_convert.checkpoint.read import checkpoint_settings, load_checkpoint, original_of, read_report
from mxd_convert.data.blocks import prepare_eval
from mxd_convert.evaluation.fidelity import evaluate_models
from mxd_convert.recipe.texts import EvalText


def spread(indices: list[int]) -> list[int]:
    """Return the indices in an order whose every beginning is spread over the depth."""
    order = [indices[len(indices) // 2]]
    while len(order) < len(indices):
        left = [index for index in indices if index not in order]
        order.append(max(left, key=lambda index: min(abs(index - chosen) for chosen in order)))
    return order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--field", default="text")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--sizes", default="1,5,10,20,30")
    arguments = parser.parse_args()
    context, mask = checkpoint_settings(arguments.checkpoint)
    report = read_report(arguments.checkpoint)
    converted = load_checkpoint(arguments.checkpoint, dtype="float32")
    base = original_of(arguments.checkpoint, converted, None).float()
    order = spread(sorted(converted.mxd_layers()))
    alone = {int(index): layer.delta_ce for index, layer in report.fidelity.layers.items()}
    with tempfile.TemporaryDirectory() as folder:
        text = EvalText(path=str(arguments.data.absolute()), text=arguments.field, tokens=arguments.tokens)
        blocks = prepare_eval(text, context, load_tokenizer(str(arguments.checkpoint)), Path(folder))
    print("| layers | rise | KL | same most likely token | rise / sum of rises alone |\n|---|---|---|---|---|")
    for size in (int(part) for part in arguments.sizes.split(",")):
        kept = sorted(order[:size])
        reverted = [index for index in order if index not in kept]
        model = remove_layers(converted, base, reverted) if reverted else converted
        sites = find_sites(base, converted.config, kept)
        figures = evaluate_models(base, model, sites, blocks, mask=mask, quick=True)["fidelity"]
        named = ", ".join(map(str, kept)) if size <= 5 else str(size)
        ratio = figures["delta_ce"] / sum(alone[index] or 0.0 for index in kept)
        print(
            f"| {named} | {figures['delta_ce']:+.4f} ± {figures['delta_ce_se']:.4f} | {figures['kl']:.4f} |"
            f" {figures['top1_agreement']:.1%} | {ratio:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
