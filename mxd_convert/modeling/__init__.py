"""The code that every checkpoint ships: four flat files that depend only on torch and transformers."""

from pathlib import Path

SHIPPED = tuple(sorted(Path(__file__).parent.glob("*_mxd.py")))
