"""For other tools: static transcoders in the layouts of sparsify and circuit-tracer, activations in delphi's, steering in lm-eval's."""

from mxd_convert.exporting.delphi import cache_activations
from mxd_convert.exporting.lm_eval import export_steering
from mxd_convert.exporting.transcoders import export_transcoder

__all__ = ["cache_activations", "export_steering", "export_transcoder"]
