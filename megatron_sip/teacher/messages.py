"""What travels between a trainer and its teacher process, pickled over a socket pair."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sip.teacher.interfaces import JudgeRequest, JudgeResult, RewriteRequest, RewriteResult


@dataclass(frozen=True)
class Start:
    """First message to the process: how to build its teacher."""

    factory: str
    """``package.module:function``, called with ``config`` and ``options``."""
    config: Any
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Submit:
    ticket: Hashable
    request: JudgeRequest | RewriteRequest


@dataclass(frozen=True)
class GetState:
    ticket: Hashable


@dataclass(frozen=True)
class SetState:
    ticket: Hashable
    state: Mapping[str, Any]


@dataclass(frozen=True)
class Close:
    pass


@dataclass(frozen=True)
class Ready:
    """First message from the process: its teacher is built."""


@dataclass(frozen=True)
class Answer:
    ticket: Hashable
    result: JudgeResult | RewriteResult | Mapping[str, Any] | None


@dataclass(frozen=True)
class Failure:
    ticket: Hashable | None
    """None: the process itself failed and ends."""
    kind: str
    """Class name of the exception."""
    message: str
    traceback: str
