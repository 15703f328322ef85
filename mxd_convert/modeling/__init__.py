"""What ships inside every checkpoint: three flat files that need nothing but torch and transformers."""

from pathlib import Path

SHIPPED = tuple(sorted(Path(__file__).parent.glob("*_mxd.py")))
