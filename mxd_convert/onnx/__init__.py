"""For runtimes without PyTorch: the export, and `OnnxModel`, which runs its result on onnxruntime alone.

Imported name by name when used, so that running a model needs neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mxd_convert.onnx.export import Export, export_onnx
    from mxd_convert.onnx.runtime import OnnxModel

_HOMES = {"Export": "export", "OnnxModel": "runtime", "export_onnx": "export"}
__all__ = ["Export", "OnnxModel", "export_onnx"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"mxd_convert.onnx.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
