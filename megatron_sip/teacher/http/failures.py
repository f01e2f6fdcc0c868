"""What can go wrong with one call, told apart: a failure is never a score."""

from __future__ import annotations

import datetime
import email.utils
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TRANSPORT = "transport"
"""No complete HTTP answer: refused or reset connection, time-out, body cut short."""
SERVER = "server"
"""An HTTP answer without a completion: 5xx, 408, 429, a body that is no completion, an aborted generation."""
UNPARSABLE = "unparsable"
"""A completion without a verdict, or cut off before its end."""
REFUSED = "refused"
"""The model declined, or a content filter stepped in."""
TOO_LONG = "too_long"
"""The prompt does not fit the model's context."""
REJECTED = "rejected"
"""Any other 4xx: a wrong model name, key or parameter. Asking again does not help."""

KINDS = (TRANSPORT, SERVER, UNPARSABLE, REFUSED, TOO_LONG, REJECTED)

REMOTE_COUNTS = ("requests", "attempts", "retries", "hedges", "asked_again", "breaker_opened")
"""What the log shows of the client's counts."""

_TRANSIENT_STATUS = (408, 429)
_TOO_LONG_CODES = ("context_length_exceeded", "string_above_max_length")
_TOO_LONG_WORDS = ("context length", "maximum input length", "too many tokens", "prompt is too long")
_MAX_MESSAGE = 200


@dataclass(frozen=True)
class Failure:
    """Why a call has no answer."""

    kind: str
    message: str
    transient: bool = False
    """Whether the same call may succeed later."""
    retry_after_s: float | None = None
    """How long the server wants to be left alone."""
    harms_endpoint: bool = False
    """Whether it speaks against the endpoint's health; 429 and other 4xx come from a healthy server."""

    def __str__(self) -> str:
        """As it stands in ``Verdict.failure``: the kind up to the colon."""
        return f"{self.kind}: {self.message}"


def kind_of(failure: str) -> str:
    """The kind at the start of a ``Verdict.failure``; ``other`` for texts of another origin."""
    kind = failure.partition(":")[0]
    return kind if kind in KINDS else "other"


def failure_of_status(status: int, body: Any, headers: Mapping[str, str], now: datetime.datetime) -> Failure:
    """The failure behind an HTTP status of 300 or more; ``body`` is decoded JSON, or None if it was none."""
    message, code, parameter = _error_fields(body)
    text = f"HTTP {status}" + (f" {message}" if message else "")
    if status in _TRANSIENT_STATUS or status >= 500:
        wait = retry_after(headers.get("Retry-After"), now)
        return Failure(SERVER, text, transient=True, retry_after_s=wait, harms_endpoint=status >= 500 and wait is None)
    words = message.casefold()
    if status == 413 or (
        status == 400
        and (parameter == "input_tokens" or code in _TOO_LONG_CODES or any(w in words for w in _TOO_LONG_WORDS))
    ):
        return Failure(TOO_LONG, text)
    return Failure(REJECTED, text)


def _error_fields(body: Any) -> tuple[str, str, str]:
    """Message, code and parameter of an error: OpenAI's object, a plain string (vLLM's 401), or a ``detail``."""
    if not isinstance(body, Mapping):
        return "", "", ""
    error = body.get("error", body.get("detail", body))
    if isinstance(error, Mapping):
        message, code, parameter = (str(error.get(name) or "") for name in ("message", "code", "param"))
    else:
        message, code, parameter = str(error), "", ""
    return " ".join(message.split())[:_MAX_MESSAGE], code, parameter


def retry_after(value: str | None, now: datetime.datetime) -> float | None:
    """Seconds in a Retry-After header, given as seconds or as an HTTP date; None if absent or not understood."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return max(0.0, (moment - now).total_seconds())
