"""Linear probes on the mean coefficients of documents."""
