"""Text and labelled documents as packed blocks of tokens on disk, with a fingerprint."""
