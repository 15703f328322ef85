"""Public functions, one file per command."""
