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
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        Optional[str], typer.Option("--revision", help="Branch to publish to, created if missing. Default: main.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request to main instead of committing.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Verify and show the changes; publish nothing.")] = False,
    message: Annotated[Optional[str], typer.Option("--message", "-m", help="Commit message.")] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace the whole content of the repository with this checkpoint.")
    ] = False,
    base: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Verify a checkpoint or a delta and publish it on the Hub in one commit.

    The Hub's hashes are then compared with the local files. The same command resumes an interrupted push. The access token is the
    one stored by `hf auth login`, or HF_TOKEN.
    """
    done = mxd_convert.push(checkpoint, repo_id, private, revision, create_pr, dry_run, message, replace, base, _preview)
    if as_json:
        print_json(done.to_dict())
        return
    if dry_run:
        human.print("nothing was published: --dry-run")
    elif done.commit is None:
        human.print("nothing to publish: the repository already has the same files")
    else:
        human.print(f"published, commit {done.commit}; the Hub's hashes match the local files")
    show(done.pull_request or done.url)


def _preview(plan: Any) -> None:
    for check in plan.verification.checks:
        if check.ok is None:
            human.print(f"not checked: {check.check}: {check.detail}", soft_wrap=True)
    difference = plan.difference
    human.print(f"{plan.repo_id}: {'a new repository' if plan.new else 'an existing repository'}; changes:")
    for name in ("added", "changed", "removed", "left", "same"):
        files = getattr(difference, name)
        if not files:
            continue
        human.print(f"  {name:<8} {len(files):>4}  {size_of(sum(files.values())):>10}")
        if name != "same":
            for path, size in files.items():
                human.print(f"      {path}  {size_of(size)}", soft_wrap=True)
