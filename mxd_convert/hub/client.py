"""The Hub's client, and its many ways to fail in a line each.

huggingface_hub retries some requests and not others; here all of them are, as long as they can be repeated without harm. The token is taken
from where huggingface_hub keeps it; it stands in no message.
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

AGAIN = "give the same command again: it goes on where it stopped"
LOGIN = "run `hf auth login`, or set HF_TOKEN"
ATTEMPTS = 4
MOST_PATIENCE = 120  # seconds that the Hub may ask to wait
TOO_MANY = 429
_AGAIN = (TOO_MANY, 500, 502, 503, 504)
_LOST = (httpx2.NetworkError, httpx2.TimeoutException, httpx2.RemoteProtocolError)

Found = TypeVar("Found")


def client() -> HfApi:
    """Raises InputError where the network is switched off."""
    if constants.HF_HUB_OFFLINE:
        raise InputError("HF_HUB_OFFLINE is set, so the Hub can't be reached; unset it")
    return HfApi(library_name="mxd-convert", library_version=mxd_convert.__version__)


def check_name(repo_id: str) -> None:
    """Raises InputError for what can't be a repository's name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{repo_id}: not a repository's name ({_first_line(error)}); write it as owner/name") from None


def patiently(ask: Callable[[], Found]) -> Found:
    """What `ask` returns, asked again where the connection was lost or the Hub was busy, after as long as it says.

    Only for what does no harm when it is done twice.
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
    """Whether it may go well the next time."""
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return error.response.status_code in _AGAIN and _asked_to_wait(error) <= MOST_PATIENCE
    if is_out_of_memory(error):
        return False
    if isinstance(error, RuntimeError):  # Xet's, or that of a file that was being sent, with its cause
        return error.__cause__ is None or _passes(error.__cause__)
    return isinstance(
        error, (*_LOST, ConnectionError, json.JSONDecodeError)
    )  # the last: a page of a proxy's in place of an answer


def _asked_to_wait(error: BaseException) -> float:
    """Seconds after which the Hub says to come again; 0 where it does not say."""
    if not isinstance(error, HfHubHTTPError) or error.response is None:
        return 0.0
    limits = parse_ratelimit_headers(error.response.headers) if error.response.status_code == TOO_MANY else None
    if limits is not None and limits.remaining == 0:
        return limits.reset_in_seconds + 1.0
    said = error.response.headers.get("Retry-After", "")
    return float(said) if said.isdigit() else 0.0


@contextmanager
def explained(repo_id: str, doing: str, revision: str | None = None) -> Iterator[None]:
    """Turns whatever the Hub or the way there says no with into an InputError. doing: `publishing`, `downloading`, as the message has it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise InputError(
                f"{repo_id}: no space left on the disk while {doing}; free some and give the same command again"
            ) from None
        message = _explanation(error, repo_id, doing, revision)
        if message is None:
            raise
        raise InputError(_without_token(message)) from error


def _explanation(error: Exception, repo_id: str, doing: str, revision: str | None) -> str | None:
    # a failed upload of one file is wrapped, and what went wrong is its cause
    cause = error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error
    if isinstance(cause, LocalEntryNotFoundError) and isinstance(cause.__cause__, Exception):
        cause = cause.__cause__  # a download that found nothing on this machine either
    place = constants.ENDPOINT
    hidden = "or it is private and your token may not read it" if get_token() else f"or it is private: then {LOGIN}"
    known: tuple[tuple[Any, str], ...] = (
        (LocalTokenNotFoundError, f"{repo_id}: {doing} needs a token of yours and there is none; {LOGIN}"),
        (OfflineModeIsEnabled, "HF_HUB_OFFLINE is set, so the Hub can't be reached; unset it"),
        (GatedRepoError, f"{repo_id}: its owner gives access on request only; ask for it on {place}/{repo_id}"),
        (RevisionNotFoundError, f"--revision {revision}: {repo_id} has no such branch, tag or commit"),
        (RepositoryNotFoundError, f"{repo_id}: no such repository on {place}, {hidden}"),
        ((*_LOST, ConnectionError), f"{repo_id}: {place} can't be reached ({_first_line(cause)}); {AGAIN}"),
        (json.JSONDecodeError, f"{repo_id}: {place} answers with something else than the Hub does; {AGAIN}"),
    )
    for kinds, message in known:
        if isinstance(cause, kinds):
            return message
    if isinstance(cause, HfHubHTTPError) and cause.response is not None:
        return _of_status(cause, repo_id, doing)
    if isinstance(cause, (httpx2.HTTPError, RuntimeError)):
        return f"{repo_id}: {doing} failed ({_first_line(cause)}); {AGAIN}"
    if isinstance(
        cause, ValueError | OSError | TypeError
    ):  # the client's own, of a card for example, with the reason in the next line
        return f"{repo_id}: {doing} failed: {' '.join(str(cause).split()) or type(cause).__name__}"[:400]
    return None


def _of_status(error: HfHubHTTPError, repo_id: str, doing: str) -> str:
    assert error.response is not None
    status, said = error.response.status_code, (error.server_message or "").splitlines()
    reason = f" ({said[0]})" if said else ""
    if status == 401:
        return f"{repo_id}: the Hub does not accept your token{reason}; {LOGIN}"
    if status == 403:
        return f"{repo_id}: your token does not allow {doing}{reason}; use one with that right, or another owner"
    if status in (409, 412):
        return f"{repo_id}: it was changed by someone else at the same time{reason}; give the same command again to see what it would change now"
    if status == TOO_MANY:
        wait = _asked_to_wait(error)
        return f"{repo_id}: the Hub says there were too many requests; {AGAIN}" + (
            f", in {wait:.0f} s" if wait else " in a while"
        )
    if status >= 500:
        return f"{repo_id}: the Hub is in trouble (status {status}); {AGAIN}"
    return f"{repo_id}: {doing} failed with status {status}{reason}"


def _without_token(message: str) -> str:
    token = get_token()
    return message.replace(token, "***") if token else message


def _first_line(error: Any) -> str:
    text = str(error).strip() or type(error).__name__
    return next(line.strip() for line in text.splitlines() if line.strip())[:300]
