"""Training of one transcoder here and with sparsify: the same base, layer, blocks, tokens, latents and k, side by side in one run.

    pip install eai-sparsify==1.3.3
    SPARSIFY_DISABLE_TRITON=1 python benchmarks/against_sparsify.py [--model FOLDER_OR_GGUF] [--layer 2] [--tokens 100000] [--skip]

Each is trained `--rounds` times in turn, at its own learning rate. Tokens per second are of the training alone, and the ratio is of the
medians. FVU is on the same held-out blocks. sparsify's optimiser is `--optimizer` (its default on GPUs is signum; 8-bit Adam needs one).
"""

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

import torch

from mxd_convert.base_model.capture import harvest
from mxd_convert.base_model.load import base_tokenizer, load_base
from mxd_convert.data.blocks import Blocks, block_order, prepare
from mxd_convert.evaluation.variance import Variance
from mxd_convert.plan.resolve import Plan, make_plan
from mxd_convert.recipe.load import load_recipe
from mxd_convert.training.accelerator import new_accelerator
from mxd_convert.training.loop import Job, train_layers
from runs import SHARED

EVAL_ROWS = 16  # blocks per forward of the evaluation


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHARED / "models" / "stories260K"))
    parser.add_argument("--data", default=str(SHARED / "data" / "stories.jsonl.gz"))
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=512, help="tokens per step, of both")
    parser.add_argument("--expansion", type=int, default=8)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--skip", action="store_true", help="skip transcoders")
    parser.add_argument("--lr", type=float, default=None, help="ours; default: the fast preset's")
    parser.add_argument("--their-lr", type=float, default=None, help="theirs; default: sparsify's")
    parser.add_argument("--optimizer", default="adam", choices=["adam", "signum", "muon"])
    parser.add_argument(
        "--precision", default="auto", choices=["auto", "fp32", "bf16"], help="ours; sparsify is in float32 on a CPU"
    )
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def plan_of(args: argparse.Namespace) -> Plan:
    """Return the plan of our side: a transcoder of expansion x I latents in one layer, without a joint stage."""
    recipe = {
        "base": {"model": args.model},
        "data": {
            "train": {"path": args.data},
            "eval": {"tokens": 32_768},
            "context": args.context,
            "tokens": args.tokens,
        },
        "layers": [args.layer],
        "layer": {"kind": "skip_transcoder" if args.skip else "transcoder", "k": args.k, "expansion": args.expansion},
        "train": {"joint": 0.0, "batch_tokens": args.batch, "lr": args.lr, "precision": args.precision, "device": "cpu"},
        "output": {"dir": "unused"},
    }
    plan = make_plan(load_recipe(recipe))
    latents = args.expansion * plan.layers[0].shape.d_in  # the skip path comes on top, as in sparsify
    layer = plan.recipe.layer.model_copy(update={"experts": latents})
    return make_plan(plan.recipe.model_copy(update={"layer": layer}))


def ours(plan: Plan, base: Any, train: Blocks) -> tuple[Any, float]:
    """Train our layer. Return it and the seconds of training."""
    with tempfile.TemporaryDirectory() as folder:
        accelerator = new_accelerator(plan.recipe.train, Path(folder))
        job = Job(
            plan.recipe,
            base,
            plan.sites,
            plan.shapes,
            train,
            Path(folder),
            accelerator,
            [[plan.sites[0].index]],
            lambda x: [x],
            True,
        )
        trained = train_layers(job)
    assert trained is not None
    return trained.layers[plan.sites[0].index], trained.seconds


def theirs(plan: Plan, base: Any, train: Blocks, args: argparse.Namespace) -> tuple[Any, float]:
    """Train sparsify's transcoder on the same blocks in the same order. Return it and the seconds of training."""
    from datasets import Dataset
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    recipe = plan.recipe
    rows = args.batch // args.context
    order = block_order(len(train), 0, plan.steps * rows, recipe.train.seed)
    blocks = Dataset.from_dict({"input_ids": train.take(order)}).with_format("torch")
    prefix = f"{base.base_model_prefix}."
    coder = SparseCoderConfig(
        num_latents=plan.layers[0].shape.n_experts,
        k=args.k,
        transcode=True,
        skip_connection=args.skip,
        expansion_factor=args.expansion,
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        config = TrainConfig(
            coder,
            batch_size=rows,
            hookpoints=[plan.sites[0].path.removeprefix(prefix)],
            optimizer=args.optimizer,
            lr=args.their_lr,
            lr_warmup_steps=recipe.train.warmup_steps,
            exclude_tokens=[] if train.bos is None else [train.bos],
            log_to_wandb=False,
            save_dir=folder,
            save_every=10**9,
        )
        trainer = Trainer(config, blocks, base.base_model)  # as its command line does: no head
        start = time.perf_counter()
        trainer.fit()
        seconds = time.perf_counter() - start
    return next(iter(trainer.saes.values())), seconds


@torch.no_grad()
def fvu(plan: Plan, base: Any, held_out: Blocks, output: Any) -> float:
    """Return the FVU of a function from inputs to outputs, on the held-out blocks."""
    site = plan.sites[0]
    variance = Variance(site.d_out, torch.device("cpu"), 1)
    for start in range(0, len(held_out), EVAL_ROWS):
        rows = slice(start, start + EVAL_ROWS)
        seen = harvest(base, [site], held_out.take(rows))[site.index]
        counted = held_out.counted(rows, "bos")
        x, y = seen.inputs[counted].float(), seen.outputs[counted].double()
        variance.add(output(x).double(), y, torch.zeros(len(x), dtype=torch.long))
    return float(variance.fvu()[0] or 0.0)


def main() -> None:
    args = arguments()
    plan = plan_of(args)
    with tempfile.TemporaryDirectory() as folder:
        train, held_out = prepare(plan.recipe.data, base_tokenizer(plan.recipe.base), Path(folder))
        base = load_base(plan.recipe.base)
        # sparsify's layers refuse bfloat16 inputs on a CPU
        whole = base if base.dtype == torch.float32 else load_base(plan.recipe.base.model_copy(update={"dtype": "float32"}))
        found: dict[str, list[tuple[float, float]]] = {"ours": [], "sparsify": []}
        for _ in range(args.rounds):
            layer, seconds = ours(plan, base, train)
            found["ours"].append((plan.tokens / seconds, fvu(plan, whole, held_out, layer)))
            coder, seconds = theirs(plan, whole, train, args)
            found["sparsify"].append((plan.tokens / seconds, fvu(plan, whole, held_out, lambda x, coder=coder: coder(x).sae_out)))
    shape = plan.layers[0].shape
    print(
        f"{plan.recipe.base.name}, layer {args.layer}: {shape}; {plan.tokens:,} tokens, base in {base.dtype}, {torch.get_num_threads()} threads\n"
    )
    print("| | tokens/s, median | of all rounds | held-out FVU |\n|---|---|---|---|")
    for name, each in found.items():
        speeds = [speed for speed, _ in each]
        rounds = ", ".join(f"{speed:,.0f}" for speed in speeds)
        print(f"| {name} | {statistics.median(speeds):,.0f} | {rounds} | {statistics.median(figure for _, figure in each):.3f} |")
    ratio = statistics.median(speed for speed, _ in found["ours"]) / statistics.median(speed for speed, _ in found["sparsify"])
    print(f"\nratio of the medians: {ratio:.2f}")


if __name__ == "__main__":
    main()
