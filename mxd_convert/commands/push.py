"""`push`: publish a checkpoint on the Hub: verify, compare, commit, compare again.

The whole change is one commit, so a repository is never half updated. `upload_folder` may split a folder of some hundred files
(a dashboard) into several commits; `create_commit` does not. Both skip files that an interrupted push has uploaded already.
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
from mxd_convert.hub.client import check_name, client, hub_errors, with_retries
from mxd_convert.hub.content import Difference, Local, compare, to_publish
from mxd_convert.hub.repository import MAIN, Repository, files_of
from mxd_convert.report.card import CARD


@dataclass(frozen=True)
class Push:
    """The result of a push, or its preview with `dry_run`.

    Attributes:
        repo_id: owner/name.
        url: the repository's page.
        new: whether the repository did not exist before.
        verification: the checks made before publishing.
        difference: the files added, changed and removed.
        commit: hash of the commit; None if nothing was committed.
        pull_request: URL of the pull request, if one was opened.
    """

    repo_id: str
    url: str
    new: bool
    verification: Verification
    difference: Difference
    commit: str | None = None
    pull_request: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values; sizes of files in bytes."""
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
    """Publish a converted checkpoint on the Hub, or resume an interrupted push.

    The checkpoint is verified, `preview` is called with the planned change, and one commit is made. Afterwards the Hub's hashes
    are compared with those of the folder. Nothing in `checkpoint` is changed.

    Args:
        checkpoint: folder of a checkpoint or a delta.
        repo_id: owner/name, or a name in your own namespace.
        private: make the repository private if it is created.
        revision: a branch; created if it doesn't exist.
        create_pr: open a pull request to main instead of committing to it.
        dry_run: verify and compare, but publish nothing.
        message: the commit message.
        replace: remove all other files from the repository.
        base: the base model, if it is not the recorded one.
        preview: called with the planned push before anything is published.

    Returns:
        The push, or with `dry_run` its preview.

    Raises:
        InputError: if the checkpoint fails verification, the repository contains something else, the token doesn't allow it, or
            the Hub can't be reached.
    """
    folder = Path(checkpoint)
    check_folder(folder)
    if not is_delta(folder):
        read_config(folder)
    check_name(repo_id)
    if create_pr and revision not in (None, MAIN):
        raise InputError(f"--revision {revision}: a pull request goes to {MAIN}. Remove --revision or --create-pr.")
    api = client()
    with hub_errors(repo_id, "publishing", revision):
        if not dry_run or "/" not in repo_id:
            repo_id = _full_name(api, repo_id)
        there = Repository.find(api, repo_id, revision)
        there.check(api, folder, private, replace)
    verification = _verified(folder, base)
    with hub_errors(repo_id, "publishing", revision):
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
    """Check the repository's name and the token before there is a checkpoint to publish. Raises InputError if one is invalid."""
    check_name(repo_id)
    with hub_errors(repo_id, "publishing"):
        with_retries(client().whoami)


def _full_name(api: HfApi, repo_id: str) -> str:
    """Return the name with its owner. Requests the token's account, so a missing or invalid token is reported before any work."""
    account = with_retries(api.whoami)
    return repo_id if "/" in repo_id else f"{account['name']}/{repo_id}"


def _verified(folder: Path, base: str | None) -> Verification:
    """Return the checks of the folder. Raises InputError if one fails, or if the report was measured on other weights."""
    verification = verify_delta(folder, base) if is_delta(folder) else verify(folder, base)
    for check in verification.checks:
        if check.ok is False:
            detail = f" ({check.detail})" if check.detail else ""
            raise InputError(
                f'{folder}: nothing was published: the check "{check.check}" fails{detail}. `mxd-convert verify {folder}` shows all checks.'
            )
    if changed := measured_on_others(folder) if is_delta(folder) else _changed(folder):
        raise InputError(
            f"{folder}: nothing was published: {changed[0]} is not the one that {REPORT} was measured on. Restore it, or remove the"
            " report and the card (README.md), whose figures belong to another checkpoint."
        )
    return verification


def _changed(folder: Path) -> list[str]:
    return changed_files(folder, read_report(folder))


def _check_card(local: list[Local]) -> None:
    """Let the Hub validate the card's metadata before anything is created. Raises InputError with the Hub's reason."""
    content = next((file.source for file in local if file.path == CARD), None)
    if not isinstance(content, bytes):
        return
    try:
        card = ModelCard(content.decode("utf-8", "replace"), ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"{CARD}: its metadata can't be read ({first_line(error, 120)}). Correct it, or remove the file."
        ) from None
    try:
        with_retries(card.validate)
    except ValueError as error:
        try:
            reasons = "; ".join(entry["message"] for entry in json.loads(str(error))["errors"])
        except (ValueError, KeyError, TypeError):
            reasons = " ".join(str(error).split())
        raise InputError(f"{CARD}: the Hub rejects its metadata: {reasons[:300]}") from None


def _make(api: HfApi, there: Repository, repo_id: str, private: bool, revision: str | None) -> str:
    """Create the repository and its branch if they don't exist. Return the parent commit of the push."""
    head = there.head
    if head is None:
        with_retries(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True))
        head = str(with_retries(lambda: api.model_info(repo_id)).sha)
    if revision not in (None, MAIN) and not there.has_revision:
        with_retries(lambda: api.create_branch(repo_id, branch=str(revision), exist_ok=True))
    return head


def _commit(api: HfApi, planned: Push, local: list[Local], head: str, revision: str, create_pr: bool, message: str) -> Push:
    """Make the commit, and return the push with its hash and pull request."""
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
            # the Hub rejects the commit if the branch has changed since the preview
            parent_commit=None if create_pr else head,
        )

    try:
        made = commit() if create_pr else with_retries(commit)  # no retries: they could open a second pull request
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code != HTTPStatus.PRECONDITION_FAILED:
            raise
        # the branch may have changed by this commit itself, if only the Hub's response was lost
        now = str(with_retries(lambda: api.model_info(planned.repo_id, revision=revision)).sha)
        if not compare(local, files_of(api, planned.repo_id, now), replace=False).none:
            raise
        return with_(planned, commit=now)
    return with_(planned, commit=made.oid, pull_request=made.pr_url)


def _compare_again(api: HfApi, done: Push, local: list[Local]) -> None:
    """Raise InputError if the committed files differ from the folder's."""
    difference = compare(local, files_of(api, done.repo_id, str(done.commit)), replace=False)
    if wrong := sorted({**difference.added, **difference.changed}):
        raise InputError(
            f"{done.repo_id}: {wrong[0]}"
            + (f" and {len(wrong) - 1} more" if wrong[1:] else "")
            + " on the Hub differs from what was sent. Push again, or check whether the repository's .gitignore excludes it."
        )
