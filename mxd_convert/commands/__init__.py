"""The public functions, one file per command."""
