"""ONNX export: a converted model as one ONNX graph, and `OnnxModel`, which runs it with onnxruntime.

Running a model needs neither torch nor transformers, so `OnnxModel` is imported lazily.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mxd_convert.onnx.runtime import OnnxModel

__all__ = ["OnnxModel"]


def __getattr__(name: str) -> Any:
    if name == "OnnxModel":
        from mxd_convert.onnx.runtime import OnnxModel

        return OnnxModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
