"""A page for every expert, and the data files behind it."""
