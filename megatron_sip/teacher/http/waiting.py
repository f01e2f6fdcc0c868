"""Waits at the start for servers that are still loading their model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from megatron_sip.errors import JudgeError
from megatron_sip.teacher.http.config import HttpOptions
from megatron_sip.teacher.http.greeting import Greetings, greet

_ASK_EVERY_S = 3.0
_SAY_EVERY_S = 60.0
Answer = tuple[Greetings, float]
"""And the seconds waited so far."""


def _as_it_is(answer: Answer | None) -> Answer | None:
    return answer


def await_servers(
    options: HttpOptions,
    roles: Mapping[str, int],
    api_key: str,
    say: Callable[[str], None],
    is_asking: bool = True,
    share: Callable[[Answer | None], Answer | None] = _as_it_is,
) -> None:
    """Returns when each of ``roles`` has a server that can be asked; says what is wrong with others.

    ``is_asking``: whether this rank asks; ``share``: collective, gives all ranks what that one has. No rank is in it
    for longer than one question for the lists of models.

    Raises:
        JudgeError: there is none for a role: it serves another model or refuses the key, or it has not come within
            ``judge_start_wait_s``. The message is the same on all ranks.
    """
    limit_s, started = options.judge_start_wait_s, time.monotonic()
    said_s: float | None = None
    while True:
        own = (greet(options, roles, api_key), time.monotonic() - started) if is_asking else None
        answer = share(own)
        assert answer is not None
        greetings, waited_s = answer
        if not greetings.unserved:
            break
        if not greetings.may_come or waited_s >= limit_s:
            raise JudgeError(_unserved(greetings, waited_s, limit_s))
        if said_s is None or waited_s - said_s >= _SAY_EVERY_S:
            said_s = waited_s
            say(
                f"waiting for judge servers since {waited_s:.0f} s (of {limit_s:g} s, --judge-start-wait-s): "
                + "; ".join(greetings.unserved)
            )
        time.sleep(min(_ASK_EVERY_S, max(0.0, limit_s - waited_s)))
    for line in greetings.complaints:
        say(f"{line}; the run starts all the same")


def _unserved(greetings: Greetings, waited_s: float, limit_s: float) -> str:
    lines = "; ".join(greetings.unserved)
    if not greetings.may_come:
        return lines
    return (
        f"{lines}. None came within {waited_s:.0f} s: for servers that start later give a longer --judge-start-wait-s "
        f"than {limit_s:g}"
    )
