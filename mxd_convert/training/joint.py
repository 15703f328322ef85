"""The joint stage: all layers trained together in the model, on the KL divergence to the base model's next-token distribution.

Layers that are trained alone see neither the errors of other layers nor the effect of their own on the model. The joint stage
minimises KL(base || converted) plus the layers' own losses against the base's MLP outputs. These keep each layer close to the MLP
that it replaces, and are weighted to equal the KL at the first step.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mxd_convert.base_model.capture import recording
from mxd_convert.base_model.swap import replaced_mlps
from mxd_convert.base_model.tail import Tail
from mxd_convert.data.blocks import block_order
from mxd_convert.layers import LayerSpec, Trainable, normalised_mse
from mxd_convert.layers.losses import kl_terms
from mxd_convert.modeling.layers_mxd import Coefficients
from mxd_convert.recipe.schema import Recipe, figure_mask
from mxd_convert.training.balance import Measured
from mxd_convert.training.interrupt import Interrupt
from mxd_convert.training.joint_loss import chunk_tokens, summed_kl
from mxd_convert.training.stage import Pass, Stage
from mxd_convert.training.stream import Source

WARMUP = 0.1  # share of the joint stage's steps; the rate then falls linearly to 0
# tokens per forward of the model, at least one block: gradients are accumulated over a step
PIECE_TOKENS, GPU_PIECE_TOKENS = 1024, 4096


def piece_tokens(device: str) -> int:
    """Return the number of tokens per forward of the model."""
    return PIECE_TOKENS if device == "cpu" else GPU_PIECE_TOKENS


class LayerInModel(nn.Module):
    """A layer inside the model, with float32 parameters for any dtype of the model. Keeps its last output, factors and coefficients."""

    def __init__(self, layer: Trainable, precision: str) -> None:
        super().__init__()
        self.layer, self.precision = layer, precision
        self.output: Tensor
        self.factors: tuple[Tensor | None, Tensor | None]
        self.coefficients: Coefficients

    def forward(self, x_BTI: Tensor) -> Tensor:
        """Return the layer's output in the dtype of the model."""
        with torch.autocast(x_BTI.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            x_BI = x_BTI.float().flatten(0, -2)
            self.coefficients = self.layer.encode(x_BI)
            self.factors = self.layer.factors(x_BI, self.coefficients)
            self.output = self.layer.join(x_BI, *self.factors)
        # a copy: some families add to the output of an MLP in place
        return self.output.view(*x_BTI.shape[:-1], -1).to(x_BTI.dtype, copy=True)


@dataclass(frozen=True)
class Seen:
    """A forward of base and converted model on some blocks.

    kl: mean KL divergence. own: the layers' own losses. measured: for the balance terms. targets: outputs of the base's MLPs. counted:
    which tokens count; means are over these.
    """

    kl: Tensor
    own: dict[int, Tensor]
    measured: dict[int, Measured]
    layers: dict[int, LayerInModel]
    targets: dict[int, Tensor]
    counted_B: Tensor


class JointStage(Stage):
    """Training of all layers together, after each was trained alone.

    trained: the layers by index. first_step: the number of steps each has taken.
    """

    def __init__(
        self,
        recipe: Recipe,
        source: Source,
        shapes: dict[int, LayerSpec],
        folder: Path,
        accelerator: Accelerator,
        quiet: bool,
        trained: dict[int, Trainable],
        first_step: int,
    ) -> None:
        self.trained, self.first_step = trained, first_step
        self.weight = 0.0  # of the layers' own losses
        self.tail = Tail(source.base, source.sites[0])
        self.in_chunks: bool | None = None  # whether the KL can be computed in chunks, once a forward has shown it
        self.kl, self.kl_steps = torch.zeros((), dtype=torch.float64, device=accelerator.device), 0  # since the last log line
        together = source.process[1] > 1
        super().__init__(recipe, source, shapes, folder, accelerator, together, quiet, Pass("all layers together", 1, 1))

    def _rates(self) -> tuple[float, int, str]:
        lr = self.recipe.train.joint_lr
        assert lr is not None
        return lr, max(1, round(WARMUP * self.steps)), "linear"

    def _make_layers(self, shapes: dict[int, LayerSpec]) -> dict[int, Trainable]:
        return {index: self.trained[index].to(self.device) for index in sorted(self.trained)}

    def _initialise(self) -> None:
        """Set the weight of the layers' own losses from the first blocks, which are the same in all processes."""
        with torch.no_grad():
            seen = self._forward(self._rows(0)[: self._blocks_a_piece()])
        self.weight = (seen.kl / torch.stack([*seen.own.values()]).sum().clamp_min(1e-12)).item()

    def _shares(self, seconds: float) -> dict[str, float]:
        return {}  # base and layers run in the same forward

    def _advice(self) -> str:
        return f"Lower train.joint_lr ({self._rates()[0]:g}) or train.joint ({self.recipe.train.joint:g})"

    def _extra_figures(self) -> dict[str, float]:
        mean = self.kl.item() / self.kl_steps
        self.kl.zero_()
        self.kl_steps = 0
        return {"kl": mean}

    def _extra_facts(self) -> dict[str, Any]:
        return {"weight": self.weight, "kl": self.kl.item(), "kl_steps": self.kl_steps}

    def _restore_extra(self, facts: dict[str, Any]) -> None:
        self.weight, self.kl_steps = facts["weight"], facts["kl_steps"]
        self.kl.fill_(math.nan if facts["kl"] is None else facts["kl"])  # JSON has no NaN or infinity

    def _blocks_a_piece(self) -> int:
        return max(1, piece_tokens(self.device.type) // self.source.blocks.context)

    def _rows(self, step: int) -> Any:
        source = self.source
        return block_order(len(source.blocks), (self.first_step + step) * source.rows_a_step, source.rows_a_step, source.seed)

    def _forward_backward(self, step: int, interrupt: Interrupt) -> None:
        process, processes = self.source.process
        rows = self._rows(step)[process::processes]
        blocks = self.source.blocks
        total = self._agree(blocks.counted(rows, self.source.mask).sum().to(self.device), interrupt).clamp_min(1)
        losses = {index: torch.zeros((), device=self.device) for index in self.layers}
        kl_of_step = torch.zeros_like(self.kl)
        pieces = [rows[begin : begin + self._blocks_a_piece()] for begin in range(0, len(rows), self._blocks_a_piece())]
        if len(pieces) > 1 and self.balances:  # a balance term needs all of the step's tokens
            with torch.no_grad():
                for piece in pieces:
                    self._add_to_balances(self._forward(piece, with_kl=False))
            self._settle_balances()
        for piece in pieces:
            seen = self._forward(piece)
            if len(pieces) == 1:
                self._add_to_balances(seen)
                self._settle_balances()
            terms = [self.balances[index].of(measured) for index, measured in seen.measured.items()]
            # losses are means over the counted tokens; weighted by their share, they sum to the mean over all pieces and processes
            share = seen.counted_B.sum() / total
            own = torch.stack([*seen.own.values()]).sum()
            (share * (seen.kl + self.weight * own) + self.weight * sum(terms)).backward()
            kl_of_step += seen.kl.detach() * share
            for index, loss in seen.own.items():
                losses[index] += loss.detach() * share
                layer = seen.layers[index]
                self.windows[index].add(
                    loss.detach(), layer.output.detach(), seen.targets[index], layer.coefficients, seen.counted_B
                )
        for index, loss in losses.items():
            self.losses[index].append(loss)
        self.kl += self._sum_over_processes(kl_of_step)
        self.kl_steps += 1

    def _add_to_balances(self, seen: Seen) -> None:
        for index, measured in seen.measured.items():
            self.balances[index].add(measured)

    def _settle_balances(self) -> None:
        for balance in self.balances.values():
            balance.settle()

    def _forward(self, rows: Any, with_kl: bool = True) -> Seen:
        """Run base and converted model on some blocks. with_kl: whether to compute the KL divergence, which is 0 otherwise."""
        source, base = self.source, self.source.base
        ids_BT = source.blocks.take(rows)
        counted_B = source.blocks.counted(rows, source.mask).flatten().to(self.device)
        ids_BT = ids_BT.to(self.device)
        if self.in_chunks is None:
            self.in_chunks = self.tail.is_exact(ids_BT[:1])
        forward = self.tail.hidden if self.in_chunks else self._log_probs
        with torch.no_grad(), recording(base, source.sites) as seen:
            base_output = forward(ids_BT)
        layers_in_model = {index: LayerInModel(layer, self.recipe.train.precision) for index, layer in self.layers.items()}
        with replaced_mlps(base, source.sites, layers_in_model):
            output = forward(ids_BT)
        counted_BT = counted_B.view_as(ids_BT)
        kl = torch.zeros((), device=self.device)
        if with_kl and self.in_chunks:
            chunk = chunk_tokens(self.device.type, self._vocabulary())
            kl = summed_kl(self.tail, base_output, output, counted_BT, chunk)
        elif with_kl:
            kl = (kl_terms(base_output, output).sum(-1) * counted_BT).sum()
        kl = kl / counted_B.sum().clamp_min(1)
        targets = {index: seen[index].outputs.flatten(0, 1).float() for index in layers_in_model}
        own = {index: normalised_mse(layer.output, targets[index], counted_B) for index, layer in layers_in_model.items()}
        measured = {}
        figures_B = counted_B & source.blocks.counted(rows, figure_mask(source.mask)).flatten().to(self.device)
        for index, balance in self.balances.items():
            layer = layers_in_model[index]
            gain, linear = layer.factors
            assert gain is not None
            assert linear is not None
            measured[index] = balance.measure(
                (gain, linear), layer.coefficients, layer.output, targets[index], own[index], figures_B
            )
        return Seen(kl, own, measured, layers_in_model, targets, counted_B)

    def _log_probs(self, ids_BT: Tensor) -> Tensor:
        """Return the log-probabilities (B, T, V) of the next token, from a whole forward."""
        log_probs: Tensor = self.source.base(input_ids=ids_BT, use_cache=False).logits.float().log_softmax(-1)
        return log_probs

    def _vocabulary(self) -> int:
        config: Any = self.source.base.config
        return int(config.get_text_config().vocab_size)
