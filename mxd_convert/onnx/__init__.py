"""For runtimes without PyTorch: a converted model as one ONNX graph, and `OnnxModel`, which runs it on onnxruntime alone.

`OnnxModel` is imported when it is used: running a model needs neither torch nor transformers.
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
