"""Plots of a run keep every layer readable, for few layers and for many."""

import itertools
import json
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest

from mxd_convert.report import plots


@pytest.mark.parametrize(("layers", "rows"), [(4, 1), (30, 2)])
def test_every_layer_has_its_label(layers, rows, tmp_path, monkeypatch):
    indices = [str(2 * number) for number in range(layers)]
    shares = {"gate_share": 0.5, "hidden_share": None, "product_share": None, "routing_necessity": 2.0}
    report = SimpleNamespace(
        fidelity=SimpleNamespace(layers={index: SimpleNamespace(delta_ce=0.1, delta_ce_se=0.01) for index in indices}),
        reliance=SimpleNamespace(layers={index: SimpleNamespace(**shares) for index in indices}),
    )
    log = tmp_path / "log.jsonl"
    line = {"tokens": 10, "layers": {index: {"fvu": 0.5, "dead_fraction": 0.1} for index in indices}}
    log.write_text(json.dumps(line) + "\n" + json.dumps({**line, "tokens": 20, "kl": 1.0}) + "\n")
    figures = {}
    monkeypatch.setattr(plots, "save_figure", lambda figure, path, dpi=160: figures.update({path.name: figure}))
    plots.write_plots(tmp_path, report, log)
    for axis in figures["layers.png"].axes:
        figures["layers.png"].canvas.draw()
        labels = axis.get_xticklabels()
        assert [label.get_text() for label in labels] == indices
        boxes = [label.get_window_extent() for label in labels]
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))  # none overlaps its neighbour
    assert figures["layers.png"].axes[0].get_subplotspec().get_gridspec().nrows == rows
    named = figures["training.png"].axes[0].get_legend() is not None
    assert named == (rows == 1)
    assert len(figures["training.png"].axes) == 3 + (rows == 2)  # a scale of colours instead
    for figure in figures.values():
        plt.close(figure)


def test_lines_of_a_few_steps_are_not_plotted():
    lines = [{"tokens": tokens} for tokens in (100, 200, 300, 310, 410, 510, 520)]
    assert [line["tokens"] for line in plots._whole_windows(lines)] == [100, 200, 300, 410, 510]
    assert plots._whole_windows(lines[:1]) == lines[:1]
    groups = [{"tokens": tokens} for tokens in (100, 200, 100, 200)]  # of one group of layers after the other
    assert plots._whole_windows(groups) == groups
