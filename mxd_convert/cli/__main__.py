"""Entry point of `python -m mxd_convert.cli`, the same program as `mxd-convert`."""

from mxd_convert.cli import main

main()
