"""Talks to the hub: tries again where that helps, and says in one line what went wrong and what to do."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

#: Statuses after which the same request may well succeed. 409: another commit is in progress; 422: a file was damaged
#: on its way.
PASSING = (408, 409, 422, 429, 500, 502, 503, 504)
WAITS = (1, 4, 16)  # seconds before each further attempt

_HELP = {
    401: "the hub does not know this token: log in with `hf auth login`, or set HF_TOKEN",
    403: "this token may not write to {repo}: use a write token of somebody who may, or open a pull request (--pr)",
    404: "there is no {repo}, or this token may not see it: check the name, or log in with `hf auth login`",
    409: "{repo} is being changed by somebody else: try again later",
    413: "a file is larger than the hub takes: `merge`, and `export` with --native, write weights in parts of 5 GB",
    429: "the hub has had too many requests from here: try again in a few minutes",
}
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{3,}")


def persist(step: Callable[[], T]) -> T:
    """Runs a step of an upload, and runs it again after a fault that may pass.

    What has been uploaded stays with the hub, so a further attempt sends only what is missing.
    """
    for wait in WAITS:
        try:
            return step()
        except Exception as error:
            fault = network_fault(error)
            # What the client wraps was about one file, whose address of its own may have run out
            if fault is None or (fault is error and _status(fault) not in (None, *PASSING)):
                raise
            reason = f"status {_status(fault)}" if _status(fault) else "no answer"
            print(f"the hub has not taken this ({reason}): trying again in {wait} s", file=sys.stderr)
            time.sleep(wait)
    return step()


@contextmanager
def explained(repo: str) -> Iterator[None]:
    """Turns errors of the hub and of the network into a ValueError of one line, without any token."""
    try:
        yield
    except Exception as error:
        fault = network_fault(error)
        if fault is None:
            raise
        raise ValueError(explain(fault, repo)) from None


def explain(error: BaseException, repo: str) -> str:
    """Says what went wrong and what to do; see :func:`explained`."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = _status(error)
    detail = without_tokens(" ".join(str(error).split()))[:300]
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the hub cannot be reached: unset it"
    if status is None:
        return f"the hub cannot be reached ({detail}): check the network and run the same command again"
    if status in _HELP:
        return f"{_HELP[status].format(repo=repo)} (status {status})"
    if status >= 500:
        return f"the hub has a fault of its own (status {status}): run the same command again later"
    return f"the hub refused {repo} (status {status}): {detail}"


def _status(error: BaseException) -> int | None:
    """Returns an error's HTTP status, None where there was no answer."""
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


def without_tokens(text: str) -> str:
    """Blots out what looks like a token of the hub."""
    return _TOKEN.sub("hf_***", text)


def refuse_tokens(folder: Path) -> None:
    """Raises ValueError if a text file in ``folder`` holds the token in use, or what looks like one of the hub's."""
    from huggingface_hub import get_token

    token = get_token()
    long = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.suffix not in (".safetensors", ".png"):
            text = file.read_text(encoding="utf8", errors="replace")
            if (token and token in text) or long.search(text):
                raise ValueError(f"{file.relative_to(folder)} holds an access token: remove it before you push")


def network_fault(error: BaseException | None) -> BaseException | None:
    """Returns what the hub or the network did wrong, which the client may have wrapped; None for other errors."""
    from huggingface_hub.errors import HfHubHTTPError

    # The first base is the HTTP client's own error, for when no answer comes at all
    kinds = (HfHubHTTPError, HfHubHTTPError.__bases__[0], ConnectionError, TimeoutError)
    while error is not None and not isinstance(error, kinds):
        error = error.__cause__
    return error
