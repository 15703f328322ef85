"""Linear probes on documents' mean coefficients."""
