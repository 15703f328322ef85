"""Converted checkpoints: reading, verification, provenance, labels, deltas, and the workspace of a run."""
