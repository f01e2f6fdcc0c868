"""Makes bad continuations out of good ones by asking a strong model (paper, Figure 10)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from megatron_sip.teacher.corrupter import Corruption
from megatron_sip.teacher.http.client import ChatClient
from megatron_sip.teacher.http.config import RoleSettings
from megatron_sip.teacher.http.failures import REFUSED, UNPARSABLE, Failure
from megatron_sip.teacher.http.judges import request_body
from megatron_sip.teacher.http.reply import Choice
from megatron_sip.teacher.http.templates import Template
from megatron_sip.teacher.http.verdicts import is_refusal
from megatron_sip.teacher.interfaces import RewriteItem

MARKER = "CORRUPTED CONTINUATION:"
KIND = "model"


class HttpCorrupter:
    """What follows the marker is the corruption; an answer without it, or cut before its end, is none."""

    def __init__(self, template: Template, client: ChatClient, settings: RoleSettings, attempts: int = 2) -> None:
        """``attempts``: samples to draw at most until one is usable."""
        self._template = template
        self._client = client
        self._settings = settings
        self._attempts = attempts

    async def corrupt(self, items: Sequence[RewriteItem]) -> list[Corruption]:
        return list(await asyncio.gather(*(self._corrupt(item) for item in items)))

    async def _corrupt(self, item: RewriteItem) -> Corruption:
        messages = self._template.render({"prefix": item.prefix.text, "suffix": item.suffix.text})
        body = request_body(self._settings, messages)
        found = Corruption(None, KIND)
        for _ in range(self._attempts):
            reply = await self._client.complete(lambda: body)
            if isinstance(reply, Failure):
                return Corruption(None, KIND, str(reply))
            found = _read(reply.choices[0], item)
            if found.text is not None:
                break
        return found


def _read(choice: Choice, item: RewriteItem) -> Corruption:
    if choice.failure is not None:
        return Corruption(None, KIND, str(choice.failure))
    _, marker, text = choice.text.rpartition(MARKER)
    if not marker or choice.cut or not text.strip():
        refused = is_refusal(choice.text.lstrip())
        failure = Failure(REFUSED, "declined") if refused else Failure(UNPARSABLE, f"no whole text after {MARKER}")
        return Corruption(None, KIND, str(failure))
    if text.split() == item.suffix.text.split():
        return Corruption(None, KIND, str(Failure(UNPARSABLE, "unchanged")))
    # The blank between prefix and suffix is the suffix's own.
    start = item.suffix.text[: len(item.suffix.text) - len(item.suffix.text.lstrip())]
    return Corruption(start + text.strip(), KIND)
