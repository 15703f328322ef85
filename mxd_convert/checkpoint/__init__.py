"""A finished folder: reading, verifying, provenance, labels, deltas, and the workspace of the run that makes it."""
