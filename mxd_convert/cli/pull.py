"""The command `pull`."""

from pathlib import Path
from typing import Annotated, Optional

import typer

import mxd_convert
from mxd_convert.cli.app import (
    JsonOption,
    RepositoryArgument,
    app,
    human,
    print_json,
    show,
    size_of,
)


@app.command(epilog="Example: `mxd-convert pull alice/quickstart-mxd models/quickstart-mxd`")
def pull(
    repo_id: RepositoryArgument,
    output: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write.")],
    revision: Annotated[Optional[str], typer.Option("--revision", help="Branch, tag or commit. Default: main.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Download a checkpoint or a delta from the Hub, and compare every file with the Hub's hash.

    The same command resumes an interrupted download.
    """
    done = mxd_convert.pull(repo_id, output, revision)
    if as_json:
        print_json(done.to_dict())
        return
    what = (
        "already downloaded and complete"
        if done.already_there
        else f"{len(done.files)} files, {size_of(sum(done.files.values()))}"
    )
    human.print(f"commit {done.commit}: {what}")
    show(done.output)
