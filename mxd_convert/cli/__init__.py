"""The command line: parses, calls the public face, prints. No logic. One file a group of commands."""

import os
import sys
import time
import traceback

import typer

from mxd_convert.cli import converting, dashboard, deploying, editing, exporting, hub, probing, reading, steering, sweeping
from mxd_convert.cli.app import app, settings
from mxd_convert.errors import INTERRUPTED, INTERRUPTED_AND_TOLD, InputError, is_disk_full

__all__ = [
    "converting",
    "dashboard",
    "deploying",
    "editing",
    "exporting",
    "hub",
    "main",
    "probing",
    "reading",
    "steering",
    "sweeping",
]

OTHERS_SPEAK = 10.0  # seconds in which another process says what is wrong, and its end ends this one


def main() -> None:
    """The program. Exit status: 0 done, 1 a check failed, 2 the input is at fault, 130 interrupted (resumable)."""
    try:
        status = app(standalone_mode=False)
        if status == INTERRUPTED:  # typer turns Ctrl-C into this
            raise KeyboardInterrupt
        if status == INTERRUPTED_AND_TOLD:
            time.sleep(OTHERS_SPEAK / 10)  # what it says is short
            status = INTERRUPTED
        sys.exit(status)
    except InputError as error:
        if settings.debug:
            traceback.print_exc()
        if error.told:  # torchrun ends all processes with the first, which must be the one that speaks; if none does, this one
            time.sleep(OTHERS_SPEAK)
        print(f"mxd-convert: {error}", file=sys.stderr)
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        without = ", without --fresh," if "--fresh" in sys.argv else ""
        resumable = (
            f"; the same command{without} goes on where it stopped"
            if sys.argv[1:2] in (["run"], ["push"], ["pull"], ["sweep"])
            else ""
        )
        print(f"mxd-convert: interrupted{resumable}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # typer's own, of a mistake in the options themselves
            if os.environ.get("LOCAL_RANK", "0") == "0":
                error.show()
            sys.exit(error.exit_code)
        if settings.debug or not (is_disk_full(error) or (isinstance(error, OSError) and error.filename)):
            raise
        what = "no space left on the disk" if is_disk_full(error) else f"{getattr(error, 'filename', '')}: can't be used"
        print(f"mxd-convert: {what} ({getattr(error, 'strerror', None) or error})", file=sys.stderr)
        sys.exit(2)
