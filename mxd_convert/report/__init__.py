"""What a finished run says of itself: the metrics file, plots and the model card. Every figure comes from the report."""

from mxd_convert.report.card import write_card
from mxd_convert.report.metrics import build_report, versions
from mxd_convert.report.plots import write_plots

__all__ = ["build_report", "versions", "write_card", "write_plots"]
