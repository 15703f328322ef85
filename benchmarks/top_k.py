"""Exact top-k of gate values on the CPU: torch's, and ours of two stages by numpy's partition.

    python benchmarks/top_k.py [--rows 512]

Milliseconds are the least of several calls, in turn. The last column is the time of the gate's product that makes the values.
"""

import argparse
import time
from collections.abc import Callable

import torch

from mxd_convert.layers.sparse_ops import reference

SHAPES = ((64, 512, 32), (64, 1780, 32), (256, 2000, 8), (576, 4031, 32), (576, 4031, 128), (768, 21_490, 32))  # I, N, K
ROUNDS = 20


def least(*functions: Callable[[], object]) -> list[float]:
    """Return each function's least milliseconds over rounds in turn."""
    best = [float("inf")] * len(functions)
    for _ in range(ROUNDS):
        for number, function in enumerate(functions):
            start = time.perf_counter()
            function()
            best[number] = min(best[number], time.perf_counter() - start)
    return [1e3 * seconds for seconds in best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    arguments = parser.parse_args()
    print(f"{arguments.rows} rows, {torch.get_num_threads()} threads\n")
    print("| N | K | dtype | torch, ms | here, ms | ratio | the product, ms |\n|---|---|---|---|---|---|---|")
    for width, experts, k in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            x, weight = torch.randn(arguments.rows, width).to(dtype), torch.randn(experts, width).to(dtype)
            bias = torch.zeros(experts, dtype=dtype)
            gate = reference.gate_values(x, weight, bias)
            theirs, ours, product = least(
                lambda gate=gate, k=k: gate.topk(k, dim=-1, sorted=False),
                lambda gate=gate, k=k: reference.top_k(gate, k),
                lambda x=x, weight=weight, bias=bias: reference.gate_values(x, weight, bias),
            )
            name = str(dtype).removeprefix("torch.")
            print(f"| {experts:,} | {k} | {name} | {theirs:.2f} | {ours:.2f} | {theirs / ours:.1f} | {product:.2f} |")


if __name__ == "__main__":
    main()
