"""The rewriter that asks a server. The prefix's last words are put into its mouth, and taken out of its answer."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import replace

from megatron_sip.teacher.http.client import ChatClient
from megatron_sip.teacher.http.config import RoleSettings
from megatron_sip.teacher.http.failures import REFUSED, SERVER, UNPARSABLE, Failure
from megatron_sip.teacher.http.judges import identity_of, request_body
from megatron_sip.teacher.http.reply import Choice
from megatron_sip.teacher.http.templates import Template, prompt_digest
from megatron_sip.teacher.http.verdicts import is_refusal
from megatron_sip.teacher.interfaces import JudgeIdentity, Rewrite, RewriteItem

NUM_LEAD_IN_WORDS = 5
_LAST_WORDS = re.compile(rf"(?:\S+\s+){{0,{NUM_LEAD_IN_WORDS - 1}}}\S+\s*\Z")


def lead_in(prefix: str) -> str:
    """The last five words of a prefix as they stand there, with the white space that follows them."""
    # Searching the whole prefix would be quadratic; five words are rarely longer than this.
    found = _LAST_WORDS.search(prefix[-1000:])
    return found.group() if found else ""


class HttpRewriter:
    """A refusal, an answer that does not go on from the prefix, and a failed call give no rewrite, and say why."""

    def __init__(
        self,
        template: Template,
        client: ChatClient,
        settings: RoleSettings,
        attempts: int = 2,
        prefill: bool = True,
    ) -> None:
        """``attempts``: samples to draw at most until one is usable. ``prefill`` False leaves out the template's
        message of the assistant, for models whose chat template cannot go on from one (gpt-oss)."""
        messages = tuple((role, text) for role, text in template.messages if prefill or role != "assistant")
        self._template = Template(messages)
        self._prefilled = messages[-1][0] == "assistant"
        self._client = client
        self._settings = settings
        self._attempts = attempts

    async def rewrite(self, items: Sequence[RewriteItem]) -> list[Rewrite]:
        return list(await asyncio.gather(*(self._rewrite(item) for item in items)))

    def identity(self) -> JudgeIdentity:
        return identity_of("rewriter", self._settings)

    def prompt_hash(self, item: RewriteItem) -> str:
        return prompt_digest(self._messages(item, lead_in(item.prefix.text)))

    def _messages(self, item: RewriteItem, start: str) -> list[dict[str, str]]:
        messages = self._template.render({"prefix": item.prefix.text, "suffix": item.suffix.text, "lead_in": start})
        # White space at the end of what is given would split the model's next token from its blank.
        messages[-1]["content"] = messages[-1]["content"].rstrip()
        if self._prefilled and not messages[-1]["content"]:
            messages.pop()
        return messages

    async def _rewrite(self, item: RewriteItem) -> Rewrite:
        began, start = time.monotonic(), lead_in(item.prefix.text)
        rewrite = Rewrite(None)
        for _ in range(self._attempts):
            reply = await self._client.complete(lambda: request_body(self._settings, self._messages(item, start)))
            if isinstance(reply, Failure):
                rewrite = Rewrite(None, failure=str(reply))
                break
            rewrite = self._read(reply.choices[0], item, start)
            if rewrite.text is not None:
                break
        return replace(rewrite, latency_s=time.monotonic() - began)

    def _read(self, choice: Choice, item: RewriteItem, start: str) -> Rewrite:
        # Cut off at max_tokens it is as good as whole: it is clipped to the length of a suffix anyway.
        if choice.failure is not None:
            return _none(choice.failure)
        text = _without_lead_in(choice.text, start)
        if text is None:
            if start and not self._prefilled:
                return _none(_refusal_or(choice.text, item, UNPARSABLE, "does not begin with the prefix's last words"))
            text = choice.text
        if start != start.rstrip():
            # The prefix has this white space already.
            text = text.lstrip()
        if not text.strip():
            return _none(Failure(SERVER, "empty text", transient=True))
        if is_refusal(text.lstrip()) and not is_refusal(item.suffix.text.lstrip()):
            return _none(Failure(REFUSED, "declined"))
        if " ".join(text.split()) == " ".join(item.suffix.text.split()):
            return Rewrite(item.suffix.text, copied=True)
        return Rewrite(text)


def _without_lead_in(text: str, start: str) -> str | None:
    """What follows the lead-in, white space in it being alike; None if the text does not begin with it."""
    words = start.split()
    if not words:
        return None
    found = re.match(r"\s*" + r"\s+".join(map(re.escape, words)), text)
    return text[found.end() :] if found else None


def _refusal_or(text: str, item: RewriteItem, kind: str, message: str) -> Failure:
    refused = is_refusal(text.lstrip()) and not is_refusal(item.suffix.text.lstrip())
    return Failure(REFUSED, "declined") if refused else Failure(kind, message)


def _none(failure: Failure) -> Rewrite:
    return Rewrite(None, failure=str(failure))
