"""Export to the file formats of other tools: sparsify, circuit-tracer, delphi, lm-eval."""
