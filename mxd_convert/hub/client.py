"""The Hub's client, with retries and one-line error messages.

huggingface_hub retries only some requests; `with_retries` retries all that can safely be repeated. The token is the one that
huggingface_hub stores, and it never appears in a message.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx2
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers, validate_repo_id  # type: ignore[attr-defined]

import mxd_convert
from mxd_convert.errors import InputError, is_disk_full, is_out_of_memory

RESUME_HINT = "Run the same command again to resume."
LOGIN = "Run `hf auth login`, or set HF_TOKEN."
ATTEMPTS = 4  # per request, including the first
MAX_WAIT_SECONDS = 120  # longest wait that the Hub may request, in seconds; longer waits are reported as errors
TOO_MANY = 429  # HTTP status
_AGAIN = (TOO_MANY, 500, 502, 503, 504)
_LOST = (httpx2.NetworkError, httpx2.TimeoutException, httpx2.RemoteProtocolError)

Found = TypeVar("Found")


def client() -> HfApi:
    """Return a client of the Hub. Raises InputError if HF_HUB_OFFLINE is set."""
    if constants.HF_HUB_OFFLINE:
        raise InputError("HF_HUB_OFFLINE is set, so the Hub can't be reached. Unset it.")
    return HfApi(library_name="mxd-convert", library_version=mxd_convert.__version__)


def check_name(repo_id: str) -> None:
    """Raise InputError if `repo_id` is not a valid name of a repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{repo_id}: not a valid repository name ({_first_line(error)}). Write it as owner/name.") from None


def with_retries(ask: Callable[[], Found]) -> Found:
    """Return the result of `ask`, retried if the connection was lost or the Hub was busy.

    Waits as long as the Hub requests, otherwise 0.5, 1 and 2 seconds. Use it only for requests that can safely be repeated.
    """
    for attempt in range(ATTEMPTS):
        try:
            return ask()
        except Exception as error:
            if attempt == ATTEMPTS - 1 or not _passes(error):
                raise
            time.sleep(_asked_to_wait(error) or 2**attempt / 2)
    raise AssertionError("unreachable")


def _passes(error: BaseException) -> bool:
    """Return whether a retry may succeed."""
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return error.response.status_code in _AGAIN and _asked_to_wait(error) <= MAX_WAIT_SECONDS
    if is_out_of_memory(error):
        return False
    if isinstance(error, RuntimeError):  # raised by Xet, or by a failed upload with its cause
        return error.__cause__ is None or _passes(error.__cause__)
    # JSONDecodeError: a proxy answered with a page of its own
    return isinstance(error, (*_LOST, ConnectionError, json.JSONDecodeError))


def _asked_to_wait(error: BaseException) -> float:
    """Return the wait that the Hub requests, in seconds; 0 if it requests none."""
    if not isinstance(error, HfHubHTTPError) or error.response is None:
        return 0.0
    limits = parse_ratelimit_headers(error.response.headers) if error.response.status_code == TOO_MANY else None
    if limits is not None and limits.remaining == 0:
        return limits.reset_in_seconds + 1.0
    wait = error.response.headers.get("Retry-After", "")
    return float(wait) if wait.isdigit() else 0.0


@contextmanager
def hub_errors(repo_id: str, doing: str, revision: str | None = None) -> Iterator[None]:
    """Turn errors of the Hub and of the connection into an InputError of one line, without the token.

    Args:
        repo_id: the repository, named in the message.
        doing: the action as named in the message, such as "publishing" or "downloading".
        revision: the requested branch, tag or commit.

    Raises:
        InputError: for every known error. Others are raised unchanged.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise InputError(
                f"{repo_id}: no space left on the disk while {doing}. Free some space and run the same command again."
            ) from None
        message = _explanation(error, repo_id, doing, revision)
        if message is None:
            raise
        raise InputError(_without_token(message)) from error


def _explanation(error: Exception, repo_id: str, doing: str, revision: str | None) -> str | None:
    """Return the message for a known error, otherwise None."""
    # the client wraps the error of a failed upload of one file
    cause = error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error
    if isinstance(cause, LocalEntryNotFoundError) and isinstance(cause.__cause__, Exception):
        cause = cause.__cause__  # a failed download that also found no cached file
    endpoint = constants.ENDPOINT
    hidden = "or it is private and your token does not allow reading it" if get_token() else f"or it is private. {LOGIN}"
    known: tuple[tuple[Any, str], ...] = (
        (LocalTokenNotFoundError, f"{repo_id}: {doing} needs a token, and none was found. {LOGIN}"),
        (OfflineModeIsEnabled, "HF_HUB_OFFLINE is set, so the Hub can't be reached. Unset it."),
        (GatedRepoError, f"{repo_id}: the repository is gated. Request access at {endpoint}/{repo_id}"),
        (RevisionNotFoundError, f"--revision {revision}: {repo_id} has no such branch, tag or commit"),
        (RepositoryNotFoundError, f"{repo_id}: no such repository on {endpoint}, {hidden}"),
        ((*_LOST, ConnectionError), f"{repo_id}: {endpoint} can't be reached ({_first_line(cause)}). {RESUME_HINT}"),
        (json.JSONDecodeError, f"{repo_id}: the response from {endpoint} is not valid JSON. {RESUME_HINT}"),
    )
    for kinds, message in known:
        if isinstance(cause, kinds):
            return message
    if isinstance(cause, HfHubHTTPError) and cause.response is not None:
        return _of_status(cause, repo_id, doing)
    if isinstance(cause, (httpx2.HTTPError, RuntimeError)):
        return f"{repo_id}: {doing} failed ({_first_line(cause)}). {RESUME_HINT}"
    if isinstance(cause, ValueError | OSError | TypeError):
        # raised by the client itself, for example for a card; the reason may be on its second line
        return f"{repo_id}: {doing} failed: {' '.join(str(cause).split()) or type(cause).__name__}"[:400]
    return None


def _of_status(error: HfHubHTTPError, repo_id: str, doing: str) -> str:
    """Return the message for an HTTP status."""
    assert error.response is not None
    status, lines = error.response.status_code, (error.server_message or "").splitlines()
    reason = f" ({lines[0]})" if lines else ""
    if status == 401:
        return f"{repo_id}: the Hub does not accept your token{reason}. {LOGIN}"
    if status == 403:
        return f"{repo_id}: your token does not allow {doing}{reason}. Use a token with that permission, or another owner."
    if status in (409, 412):
        return (
            f"{repo_id}: changed by someone else at the same time{reason}. Review that change, then run the same command again."
        )
    if status == TOO_MANY:
        wait = _asked_to_wait(error)
        return f"{repo_id}: the Hub reports too many requests. Run the same command again " + (
            f"in {wait:.0f} s." if wait else "later."
        )
    if status >= 500:
        return f"{repo_id}: the Hub has a server error (status {status}). {RESUME_HINT}"
    return f"{repo_id}: {doing} failed with status {status}{reason}"


def _without_token(message: str) -> str:
    """Return the message with the token masked."""
    token = get_token()
    return message.replace(token, "***") if token else message


def _first_line(error: Any) -> str:
    """Return the first non-empty line of an error's message, at most 300 characters."""
    text = str(error).strip() or type(error).__name__
    return next(line.strip() for line in text.splitlines() if line.strip())[:300]
