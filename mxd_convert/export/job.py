"""The models, layers and text of one export of surrogates."""

from typing import Any

from torch import Tensor

from mxd_convert.base_model.families import Site, architecture_of
from mxd_convert.data.blocks import Blocks
from mxd_convert.errors import InputError
from mxd_convert.evaluation.fidelity import rows_a_batch
from mxd_convert.export.sources import batches, hookpoint
from mxd_convert.export.surrogate import is_exact
from mxd_convert.modeling.layers_mxd import FactoredLayer
from mxd_convert.recipe.schema import MASKED

ESTIMATED = 0.75  # share of the text's blocks on which means are estimated; the rest is for measurement
_SUMS = 2**30  # most bytes of float64 sums in memory at a time


class Job:
    """The models, layers and text of one export of surrogates. Raises InputError if the text is shorter than two blocks.

    Attributes:
        source: the model whose activations are used: the base model, or the converted one if there is no base model.
        layers: layers to export, by index, as are `sites` and `hookpoints`.
        groups: layer indices whose means are estimated in one pass over the text.
        estimation: batches of blocks on which means are estimated.
        measurement: batches of the other blocks, on which losses are measured.
    """

    def __init__(self, converted: Any, original: Any, blocks: Blocks, mask: str, indices: list[int]) -> None:
        self.converted, self.original, self.blocks, self.mask = converted, original, blocks, mask
        self.source = converted if original is None else original
        self.layers: dict[int, FactoredLayer] = {index: converted.mxd_layers()[index] for index in indices}
        self.hookpoints = {index: hookpoint(converted, index) for index in indices}
        self.sites = {index: self._site(index) for index in indices}
        self.groups = self._groups()
        first = self._estimated() if self.groups else 0
        widest = max(layer.n_experts for layer in self.layers.values())
        rows = rows_a_batch(blocks.context, converted.config.get_text_config().vocab_size)
        self.estimation = batches(0, first, blocks.context, len(blocks), widest)
        self.measurement = batches(first, len(blocks), blocks.context, rows, widest)
        self.first = first

    def _site(self, index: int) -> Site:
        layer, row = self.layers[index], architecture_of(self.converted.config)
        widths = (layer.d_in, layer.d_hidden, layer.d_out)
        then = tuple(path.format(i=index) for path in row.bypassed)
        return Site(index, row.path.format(i=index), *widths, "", False, bypassed=then, layer=row.layer.format(i=index))

    def _groups(self) -> list[list[int]]:
        groups: list[list[int]] = []
        room = 0
        for index, layer in self.layers.items():
            if is_exact(layer):
                continue
            size = 8 * layer.n_experts * layer.d_out
            if size > room:
                groups.append([])
                room = max(_SUMS, size)
            groups[-1].append(index)
            room -= size
        return groups

    def _estimated(self) -> int:
        if len(self.blocks) < 2:
            raise InputError(
                f"the text gives a single block of {self.blocks.context} tokens, and an export needs two: one to estimate means"
                " and one to measure losses. Give more text, or raise --tokens."
            )
        return min(len(self.blocks) - 1, max(1, round(ESTIMATED * len(self.blocks))))

    @property
    def steps(self) -> int:
        """Number of steps of the progress bar."""
        return len(self.groups) * len(self.estimation) + len(self.measurement)

    def take(self, batch: slice) -> Tensor:
        """Return token ids (B, T) on the models' device."""
        return self.blocks.take(batch).to(self.source.device)

    def document_of(self, batch: slice) -> Tensor:
        """Return the number of the document of each token, (B, T), on the models' device."""
        return self.blocks.document_of(batch).to(self.source.device)

    def counted(self, batch: slice) -> Tensor:
        """Return a bool mask (B, T) of the positions that count in means, FVU and shares."""
        return self.blocks.counted(batch, self.mask).to(self.source.device)

    def text(self) -> dict[str, Any]:
        """Return the report's entry on the use of the text."""
        masked = MASKED[self.mask]
        return {
            "tokens_estimated": self.first * self.blocks.context,
            "tokens_measured": (len(self.blocks) - self.first) * self.blocks.context,
            "masked": f"{masked} left out of means, FVU, l0 and fewer_than_k; cross-entropies are over every predicted token",
        }
