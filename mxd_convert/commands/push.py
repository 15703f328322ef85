"""`push`: verify, compare, one commit, compare again.

One commit holds the whole change, so that a repository is either as it was or as it is meant to be. `upload_folder` may spread a folder of some
hundred files (a dashboard) over several commits, hence `create_commit`, which sends the same files in the same way: what has arrived is not
sent again when the command is given again.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace as with_
from http import HTTPStatus
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

from mxd_convert.checkpoint.delta import is_delta, measured_on_others, verify_delta
from mxd_convert.checkpoint.provenance import changed_files
from mxd_convert.checkpoint.read import REPORT, check_folder, read_config, read_report
from mxd_convert.checkpoint.verify import Verification
from mxd_convert.commands.verify import verify
from mxd_convert.errors import InputError, first_line
from mxd_convert.hub.client import check_name, client, explained, patiently
from mxd_convert.hub.content import Difference, Local, compare, to_publish
from mxd_convert.hub.repository import MAIN, Repository, files_of
from mxd_convert.report.card import CARD


@dataclass(frozen=True)
class Push:
    """What a push did, or with `dry_run` would do. new: the repository was not there. commit: None where nothing was committed."""

    repo_id: str
    url: str
    new: bool
    verification: Verification
    difference: Difference
    commit: str | None = None
    pull_request: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "repo_id": self.repo_id,
            "url": self.url,
            "new": self.new,
            "commit": self.commit,
            "pull_request": self.pull_request,
            **self.difference.to_dict(),
            "verification": self.verification.to_dict(),
        }


def push(
    checkpoint: str | Path,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    message: str | None = None,
    replace: bool = False,
    base: str | None = None,
    preview: Callable[[Push], None] | None = None,
) -> Push:
    """Publishes a converted checkpoint on the Hub, or goes on with a push that was cut off.

    First `verify`; then what would change is told to `preview`; then one commit; then the Hub's hashes are compared with the folder's.
    repo_id: owner/name, or a name under your own. revision: a branch, made where it is not there. create_pr: as a pull request to main.
    replace: let the repository hold this checkpoint and nothing else, whatever it holds now. Nothing in `checkpoint` is changed.
    Raises InputError where the checkpoint fails verification, the repository holds something else, the token does not allow it, or the
    Hub can't be reached.
    """
    folder = Path(checkpoint)
    check_folder(folder)
    if not is_delta(folder):
        read_config(folder)
    check_name(repo_id)
    if create_pr and revision not in (None, MAIN):
        raise InputError(f"--revision {revision}: a pull request goes to {MAIN}; leave --revision or --create-pr out")
    api = client()
    with explained(repo_id, "publishing", revision):
        if not dry_run or "/" not in repo_id:
            repo_id = _full_name(api, repo_id)
        there = Repository.find(api, repo_id, revision)
        there.check(api, folder, private, replace)
    verification = _verified(folder, base)
    with explained(repo_id, "publishing", revision):
        local = to_publish(folder, repo_id)
        planned = Push(
            repo_id, f"{api.endpoint}/{repo_id}", there.head is None, verification, compare(local, there.files, replace)
        )
        _check_card(local)
        if preview is not None:
            preview(planned)
        if dry_run or (planned.difference.none and there.has_revision):
            return planned
        head = _make(api, there, repo_id, private, revision)
        done = _commit(
            api, planned, local, head, revision or MAIN, create_pr, message or f"MxD checkpoint {folder.resolve().name}"
        )
        _compare_again(api, done, local)
        return done


def check_account(repo_id: str) -> None:
    """What can be known long before there is something to publish. Raises InputError for an impossible name, and where there is no valid token."""
    check_name(repo_id)
    with explained(repo_id, "publishing"):
        patiently(client().whoami)


def _full_name(api: HfApi, repo_id: str) -> str:
    """The name with its owner. Asks who the token belongs to, so a missing or refused one is told before any work."""
    account = patiently(api.whoami)
    return repo_id if "/" in repo_id else f"{account['name']}/{repo_id}"


def _verified(folder: Path, base: str | None) -> Verification:
    """Raises InputError where a check fails, or the figures that would go with the checkpoint are of another."""
    verification = verify_delta(folder, base) if is_delta(folder) else verify(folder, base)
    for check in verification.checks:
        if check.ok is False:
            detail = f" ({check.detail})" if check.detail else ""
            raise InputError(
                f"{folder}: nothing was published, since it fails a check: {check.check}{detail}; `mxd-convert verify {folder}` shows all"
            )
    if changed := measured_on_others(folder) if is_delta(folder) else _changed(folder):
        raise InputError(
            f"{folder}: nothing was published, since {changed[0]} is not the one that {REPORT} was measured on; put it back, or take"
            " report and card (README.md) away, whose figures are another checkpoint's"
        )
    return verification


def _changed(folder: Path) -> list[str]:
    return changed_files(folder, read_report(folder))


def _check_card(local: list[Local]) -> None:
    """Whether the Hub takes the card's metadata, asked before anything is made there. Raises InputError with its reason."""
    content = next((file.source for file in local if file.path == CARD), None)
    if not isinstance(content, bytes):
        return
    try:
        card = ModelCard(content.decode("utf-8", "replace"), ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"{CARD}: its metadata can't be read ({first_line(error, 120)}); mend it, or take the file away"
        ) from None
    try:
        patiently(card.validate)
    except ValueError as error:
        try:
            reasons = "; ".join(entry["message"] for entry in json.loads(str(error))["errors"])
        except (ValueError, KeyError, TypeError):
            reasons = " ".join(str(error).split())
        raise InputError(f"{CARD}: the Hub does not take it: {reasons[:300]}") from None


def _make(api: HfApi, there: Repository, repo_id: str, private: bool, revision: str | None) -> str:
    """The repository and its branch, made where they are not there yet. Returns the commit that the push builds on."""
    head = there.head
    if head is None:
        patiently(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True))
        head = str(patiently(lambda: api.model_info(repo_id)).sha)
    if revision not in (None, MAIN) and not there.has_revision:
        patiently(lambda: api.create_branch(repo_id, branch=str(revision), exist_ok=True))
    return head


def _commit(api: HfApi, planned: Push, local: list[Local], head: str, revision: str, create_pr: bool, message: str) -> Push:
    difference = planned.difference
    wanted = difference.added.keys() | difference.changed.keys()
    operations: list[Any] = [CommitOperationAdd(file.path, file.source) for file in local if file.path in wanted]
    operations += [CommitOperationDelete(path) for path in difference.removed]

    def commit() -> CommitInfo:
        return api.create_commit(
            planned.repo_id,
            operations,
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            # what the preview was made of: a commit since then makes the Hub refuse this one
            parent_commit=None if create_pr else head,
        )

    try:
        made = commit() if create_pr else patiently(commit)  # asked twice, there might be two pull requests
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code != HTTPStatus.PRECONDITION_FAILED:
            raise
        # or it is this very commit, whose answer was lost on the way
        now = str(patiently(lambda: api.model_info(planned.repo_id, revision=revision)).sha)
        if not compare(local, files_of(api, planned.repo_id, now), replace=False).none:
            raise
        return with_(planned, commit=now)
    return with_(planned, commit=made.oid, pull_request=made.pr_url)


def _compare_again(api: HfApi, done: Push, local: list[Local]) -> None:
    difference = compare(local, files_of(api, done.repo_id, str(done.commit)), replace=False)
    if wrong := sorted({**difference.added, **difference.changed}):
        raise InputError(
            f"{done.repo_id}: {wrong[0]}"
            + (f" and {len(wrong) - 1} more" if wrong[1:] else "")
            + " on the Hub is not what was sent; push again, or look whether a .gitignore there keeps it out"
        )
