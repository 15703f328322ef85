"""What a child runs: the command line, or what a user of the package would write."""

import sys
from unittest import mock


def program(arguments: list[str]) -> int:
    """Run the command line in this process."""
    from mxd_convert import cli

    sys.argv = ["mxd-convert", *arguments]
    cli.main()
    return 0


def brief_program(arguments: list[str]) -> int:
    """Run it without what takes longest: the fresh processes of `push`, the many texts that `export-onnx` compares."""
    from mxd_convert.checkpoint.verify import Verification
    from mxd_convert.commands import push as pushing
    from mxd_convert.onnx import parity

    with (
        mock.patch.multiple(parity, PROMPTS=2, NEW_TOKENS=4),
        mock.patch.object(pushing, "verify", lambda folder, *more, **named: Verification(folder, [])),
    ):
        return program(arguments)


def generate_onnx(arguments: list[str]) -> int:
    """Continue a text with an exported model, as a user of `OnnxModel` would."""
    from mxd_convert.errors import InputError
    from mxd_convert.onnx import OnnxModel

    try:
        model = OnnxModel.from_pretrained(arguments[0], threads=1)
        print(ascii(model.generate("The value 41 is", 4, steering=[{"layer": 0, "expert": 1, "add": 2.0}])))
    except InputError as error:
        print(f"mxd-convert: {error}", file=sys.stderr)
        return 2
    return 0
