"""The body of a chat completion -> its choices. A body that is none is a failure, not an empty answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from megatron_sip.teacher.http.failures import REFUSED, SERVER, UNPARSABLE, Failure

_ENDED = ("stop", "eos", "eos_token", "stop_sequence", "end_turn")
_REASONING_FIELDS = ("reasoning", "reasoning_content")


@dataclass(frozen=True)
class Choice:
    """One completion."""

    text: str
    """The answer; where the server left it null (gpt-oss), the text of the reasoning field."""
    cut: bool = False
    """True if it ended at max_tokens."""
    failure: Failure | None = None
    """Why it is no answer at all: aborted, filtered, refused."""


@dataclass(frozen=True)
class Reply:
    choices: tuple[Choice, ...]


def decode_json(body: bytes) -> Any:
    """The decoded body, or None if it is not JSON."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None


def read_reply(body: bytes) -> Reply | Failure:
    """Of a 200. A failure is worth another attempt: the server did not do its work."""
    data = decode_json(body)
    if not isinstance(data, Mapping):
        return _broken("the body is not a JSON object")
    items = data.get("choices")
    if not isinstance(items, list) or not items:
        return _broken("the body has no choices")
    choices = tuple(_read_choice(item) for item in items)
    failures = [choice.failure for choice in choices if choice.failure is not None]
    if len(failures) == len(choices) and all(failure.transient for failure in failures):
        return failures[0]
    return Reply(choices)


def _broken(message: str) -> Failure:
    return Failure(SERVER, message, transient=True, harms_endpoint=True)


def _read_choice(item: Any) -> Choice:
    message = item.get("message") if isinstance(item, Mapping) else None
    if not isinstance(message, Mapping):
        return Choice("", failure=_broken("a choice has no message"))
    reason = item.get("finish_reason")
    if reason == "content_filter" or message.get("refusal"):
        return Choice("", failure=Failure(REFUSED, str(message.get("refusal") or "content filter")[:200]))
    if reason == "length":
        text = message.get("content")
        if isinstance(text, str) and text.strip():
            return Choice(text, cut=True)
        # The reasoning itself was cut: whatever it weighed last is not a conclusion.
        return Choice("", cut=True, failure=Failure(UNPARSABLE, "cut off at max_tokens before the answer"))
    if reason not in _ENDED:
        # vLLM answers 200 with "abort" and partial text when it is paused or ends.
        return Choice("", failure=Failure(SERVER, f"finish_reason is {reason!r}", transient=True))
    return Choice(_text(message))


def _text(message: Mapping[str, Any]) -> str:
    for name in ("content", *_REASONING_FIELDS):
        text = message.get(name)
        if isinstance(text, str) and text.strip():
            return text
    return ""
