"""The three training steps that the benchmarks compare, on one layer and one batch of random activations, each in a process of its own.

dense   the published step as it is formulated: the experts held as (O, N), ReLU over all N gates, a sorted top-k, a scatter back to
        (B, N), dense products for the weighted sum and its backward, activity counted over (B, N), the experts normalised and their
        gradient projected by passes of their own, plain AdamW, the C library's allocator as it comes
ours    what `mxd-convert run` does, with the figures that it logs
floor   only what no step can do without: the gate's product, the products of the encoder and the decoder, one exact top-k and one
        fused optimiser pass over all parameters
"""

import itertools
import multiprocessing
import resource
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mxd_convert.layers import MxD, normalised_mse
from mxd_convert.layers.sparse_ops import top_k
from mxd_convert.training.allocator import kept_memory
from mxd_convert.training.optimiser import Optimiser
from mxd_convert.training.window import Window

Step = Callable[[], None]
KINDS = ("dense", "ours", "floor")


@dataclass(frozen=True)
class Shape:
    """I, H, O, N, K of a layer, B of the batch."""

    d_in: int
    d_hidden: int
    d_out: int
    n_experts: int
    k: int
    batch: int
    activation: str
    glu: bool = False


SHAPES = {
    "gpt2": Shape(768, 3072, 768, 21_490, 32, 2048, "gelu_new"),
    "llama-3.2-3b": Shape(3072, 8192, 3072, 86_016, 32, 4096, "silu", glu=True),
    "stories260k": Shape(64, 172, 64, 1_780, 32, 4096, "silu", glu=True),
}


def new_layer(shape: Shape, device: torch.device) -> MxD:
    torch.manual_seed(0)
    with device:
        layer = MxD(shape.d_in, shape.d_hidden, shape.d_out, shape.n_experts, shape.k, activation=shape.activation, glu=shape.glu)
        nn.init.normal_(layer.decoder.weight, std=shape.d_hidden**-0.5)  # at 0, half of the gradients would be
    return layer


def new_batch(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_BI = torch.randn(shape.batch, shape.d_in, generator=generator)
    return x_BI.to(device), torch.randn(shape.batch, shape.d_out, generator=generator).to(device)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def ours(shape: Shape, device: torch.device, precision: str) -> Step:
    layer, (x_BI, y_BO) = new_layer(shape, device), new_batch(shape, device)
    optimiser = Optimiser({0: layer}, lr=1e-4, steps=10**6, warmup=1, schedule="constant")
    numbers = itertools.count()
    window, counted_B = Window.empty(layer, device), torch.ones(shape.batch, dtype=torch.bool, device=device)

    def step() -> None:
        with autocast(device, precision):
            coefficients = layer.encode(x_BI)
            output_BO = layer.combine(x_BI, coefficients)
        loss = normalised_mse(output_BO, y_BO, counted_B)
        loss.backward()
        window.add(loss.detach(), output_BO, y_BO, coefficients, counted_B)
        optimiser.step(next(numbers))

    return step


def dense(shape: Shape, device: torch.device, precision: str) -> Step:
    layer, (x_BI, y_BO) = new_layer(shape, device), new_batch(shape, device)
    experts_ON = nn.Parameter(layer.experts.detach().T.contiguous())
    del layer.experts
    adam = torch.optim.AdamW([*layer.parameters(), experts_ON], lr=1e-4, weight_decay=0.0)
    fired_N, since_N = torch.zeros(shape.n_experts, device=device), torch.zeros(shape.n_experts, device=device)

    def step() -> None:
        with torch.no_grad():
            experts_ON.div_(experts_ON.norm(dim=0, keepdim=True))
        adam.zero_grad()
        with autocast(device, precision):
            gate_BN = F.relu(layer.gate(x_BI))
            values_BK, indices_BK = gate_BN.topk(shape.k, dim=-1)
            a_BN = torch.zeros_like(gate_BN).scatter_(-1, indices_BK, values_BK)
            output_BO = (a_BN @ experts_ON.T) * layer.decoder(layer.hidden(x_BI)) + layer.output_bias
        loss = ((output_BO.float() - y_BO).square() / y_BO.norm(dim=-1, keepdim=True)).mean()
        with torch.no_grad():
            since_N.add_(1)
            since_N[(a_BN > 0).float().sum(0) > 0] = 0
            fired_N.add_((a_BN.abs() > 0).float().sum(0))
        loss.backward()
        with torch.no_grad():
            experts_ON.grad -= (experts_ON.grad * experts_ON).sum(0, keepdim=True) * experts_ON
        adam.step()

    return step


def floor(shape: Shape, device: torch.device, precision: str) -> Step:
    layer, (x_BI, _) = new_layer(shape, device), new_batch(shape, device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x_BI = x_BI.to(dtype)
    gate_NI, encoder_HI, decoder_OH = (linear.weight.detach().to(dtype) for linear in (layer.gate, layer.encoder, layer.decoder))
    adam = torch.optim.AdamW(layer.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    encoders = 2 if shape.glu else 1

    @torch.no_grad()
    def step() -> None:
        top_k(x_BI @ gate_NI.T, shape.k)
        for _ in range(encoders):
            z_BH = x_BI @ encoder_HI.T
        u_BO = z_BH @ decoder_OH.T
        grad_z_BH = u_BO @ decoder_OH
        u_BO.T @ z_BH
        for _ in range(encoders):
            grad_z_BH.T @ x_BI
        adam.step()

    return step


# --- each in a process of its own ----------------------------------------------------------------------------------------------


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _serve(connection: Connection, kind: str, shape: str, device_name: str, precision: str) -> None:
    device = torch.device(device_name)
    before = _peak_bytes(device)
    with nullcontext() if kind == "dense" else kept_memory():
        step = {"dense": dense, "ours": ours, "floor": floor}[kind](SHAPES[shape], device, precision)
        _answer(connection, step, device, before)


def _answer(connection: Connection, step: Step, device: torch.device, before: int) -> None:
    while (asked := connection.recv()) is not None:
        if asked == "peak":
            connection.send(_peak_bytes(device) - before)
            continue
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(asked):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        connection.send((time.perf_counter() - start) / asked)


class Worker:
    """One kind of step in a process of its own, so that its memory and its allocator are its own. A context manager."""

    def __init__(self, kind: str, shape: str, device: str, precision: str) -> None:
        context: Any = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, kind, shape, device, precision), daemon=True)
        self.process.start()
        theirs.close()

    def seconds(self, steps: int = 1) -> float:
        """Takes steps; the seconds of one."""
        self.connection.send(steps)
        return self.connection.recv()

    def peak_bytes(self) -> int:
        """The most memory held so far, above that of the imports."""
        self.connection.send("peak")
        return self.connection.recv()

    def close(self) -> None:
        self.connection.send(None)
        self.process.join()
