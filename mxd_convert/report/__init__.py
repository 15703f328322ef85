"""What a finished run says of itself: the metrics file, plots and the model card. Every figure comes from the report."""

from mxd_convert.report.card import CARD, REPOSITORY, TAG, write_card
from mxd_convert.report.compare import compare
from mxd_convert.report.frontier import row_of, write_frontier, write_table
from mxd_convert.report.metrics import build_report, versions
from mxd_convert.report.plots import write_plots
from mxd_convert.report.probe import finished_probe, probe_folder, write_probe
from mxd_convert.report.steering import measure_steering

__all__ = [
    "CARD",
    "REPOSITORY",
    "TAG",
    "build_report",
    "compare",
    "finished_probe",
    "measure_steering",
    "probe_folder",
    "row_of",
    "versions",
    "write_card",
    "write_frontier",
    "write_plots",
    "write_probe",
    "write_table",
]
