"""`python -m mxd_convert.cli` is the program `mxd-convert`."""

from mxd_convert.cli import main

main()
