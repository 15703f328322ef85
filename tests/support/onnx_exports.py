"""What the gate of `export-onnx` compares, and faults of the graphs that it must find."""

PARITY = {"PROMPTS": 20, "NEW_TOKENS": 64}
"""Prompts and new tokens of the gate's greedy texts; most tests use fewer."""


def spoilt(monkeypatch, change) -> None:
    """Apply a change to every ONNX graph that is built from now on."""
    from mxd_convert.commands import export_onnx as export

    build = export.build_graph

    def build_and_spoil(*arguments):
        built = build(*arguments)
        change(built)
        return built

    monkeypatch.setattr(export, "build_graph", build_and_spoil)


def other_rows(graph) -> None:
    """Increase the rows of the experts by one percent."""
    import onnx_ir

    value = next(value for name, value in graph.graph.initializers.items() if name.endswith("mlp.experts"))
    value.const_value = onnx_ir.tensor(value.const_value.numpy() * 1.01, name=value.name)
