"""Commands that publish and download: push, pull, list, delta, apply."""

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

import mxd_convert
from mxd_convert.cli.app import (
    BaseOption,
    CheckpointArgument,
    JsonOption,
    app,
    console,
    figure,
    human,
    print_json,
    show,
    table_of,
)

RepositoryArgument = Annotated[
    str, typer.Argument(metavar="REPO_ID", help="Repository on the Hub: owner/name, or a name of your own.")
]


@app.command(
    epilog="Examples:\n\n"
    "`mxd-convert push runs/quickstart quickstart-mxd --private`\n\n"
    "`mxd-convert push runs/quickstart alice/quickstart-mxd --dry-run`"
)
def push(
    checkpoint: CheckpointArgument,
    repo_id: RepositoryArgument,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository a private one, where it is not there yet.")
    ] = False,
    revision: Annotated[
        Optional[str], typer.Option("--revision", help="Branch to publish to; made where it is not there.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Verify and show what would change; publish nothing.")] = False,
    message: Annotated[Optional[str], typer.Option("--message", "-m", help="Of the commit.")] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Let the repository hold this checkpoint and nothing else, whatever it holds now.")
    ] = False,
    base: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish a checkpoint or a delta on the Hub: verified first, in one commit, hashes compared afterwards.

    A push that was cut off goes on with the same command. The token is the one that `hf auth login` keeps, or HF_TOKEN.
    """
    done = mxd_convert.push(checkpoint, repo_id, private, revision, create_pr, dry_run, message, replace, base, _preview)
    if as_json:
        print_json(done.to_dict())
        return
    if dry_run:
        human.print("nothing was published: --dry-run")
    elif done.commit is None:
        human.print("nothing to publish: the repository holds all of it already")
    else:
        human.print(f"published, commit {done.commit}; the Hub's hashes are those of the files")
    show(done.pull_request or done.url)


def _preview(plan: Any) -> None:
    for check in plan.verification.checks:
        if check.ok is None:
            human.print(f"not checked: {check.check}: {check.detail}", soft_wrap=True)
    difference = plan.difference
    human.print(f"{plan.repo_id}: {'a new repository' if plan.new else 'is there'}; files would be")
    for name in ("added", "changed", "removed", "left", "same"):
        files = getattr(difference, name)
        if not files:
            continue
        human.print(f"  {name:<8} {len(files):>4}  {_size(sum(files.values())):>10}")
        if name != "same":
            for path, size in files.items():
                human.print(f"      {path}  {_size(size)}", soft_wrap=True)


@app.command(epilog="Example: `mxd-convert pull alice/quickstart-mxd models/quickstart-mxd`")
def pull(
    repo_id: RepositoryArgument,
    output: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write.")],
    revision: Annotated[Optional[str], typer.Option("--revision", help="Branch, tag or commit.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Download a checkpoint or a delta from the Hub, each file held against the Hub's hash. One that was cut off goes on."""
    done = mxd_convert.pull(repo_id, output, revision)
    if as_json:
        print_json(done.to_dict())
        return
    what = "is there already, whole" if done.already_there else f"{len(done.files)} files, {_size(sum(done.files.values()))}"
    human.print(f"commit {done.commit}: {what}")
    show(done.output)


@app.command(name="list", epilog="Example: `mxd-convert list --base openai-community/gpt2`")
def list_(
    base: Annotated[
        Optional[str], typer.Option("--base", help="Only conversions of this model: gpt2, openai-community/gpt2.")
    ] = None,
    author: Annotated[Optional[str], typer.Option("--author", help="Only those of this owner.")] = None,
    limit: Annotated[Optional[int], typer.Option("--limit", help="At most so many.", min=1)] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the checkpoints on the Hub that this program made, by what their cards say. Rises are on each card's own text."""
    found = mxd_convert.list_checkpoints(base, author, limit)
    if as_json:
        print_json({"checkpoints": [one.to_dict() for one in found]})
        return
    if not found:
        human.print("none found")
        return
    table = table_of("repository", "base", "kind", "layers", "K", "rise", "verdict", "updated")
    for one in found:
        layers = "-" if one.layers is None else str(len(one.layers))
        rest = (str(one.k or "-"), figure(one.rise, "+.3f"), one.verdict or "-", one.updated or "-")
        cells = (one.repo_id, one.base or "-", (one.kind or "-").replace("_", " "), layers, *rest)
        table.add_row(*map(str, cells))
    console().print(table)


@app.command(epilog="Example: `mxd-convert delta runs/gpt2-mxd deltas/gpt2-mxd`")
def delta(
    checkpoint: CheckpointArgument,
    output: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write.")],
    base: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write only what the conversion changed: for bases that may not be passed on, and a fraction of the bytes.

    `apply` makes the full checkpoint of it again, to the bit; `mxd_convert.load` loads it as it is.
    """
    done = mxd_convert.delta(checkpoint, output, base)
    if as_json:
        print_json(done.to_dict())
        return
    human.print(
        f"{_size(done.size)} in place of {_size(done.full_size)}; {done.tensors} tensors that the base does not have",
    )
    show(done.output)


@app.command(epilog="Example: `mxd-convert apply deltas/gpt2-mxd runs/gpt2-mxd --base models/gpt2`")
def apply(
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="Folder of a delta.")],
    output: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write.")],
    base: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make the full checkpoint of a delta and its base, every file as it was. Another base is refused."""
    folder = mxd_convert.apply(delta, output, base)
    if as_json:
        print_json({"output": str(folder)})
    else:
        show(folder)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"
