"""The dashboard: a page for every expert, and its data files."""
