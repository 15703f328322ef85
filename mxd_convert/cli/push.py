"""The command `push`."""

from typing import Annotated, Any, Optional

import typer

import mxd_convert
from mxd_convert.cli.app import (
    BaseOption,
    CheckpointArgument,
    JsonOption,
    RepositoryArgument,
    app,
    human,
    print_json,
    show,
    size_of,
)


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
        human.print(f"  {name:<8} {len(files):>4}  {size_of(sum(files.values())):>10}")
        if name != "same":
            for path, size in files.items():
                human.print(f"      {path}  {size_of(size)}", soft_wrap=True)
