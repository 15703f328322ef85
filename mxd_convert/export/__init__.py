"""Layouts of other tools: sparsify, circuit-tracer, delphi, lm-eval."""
