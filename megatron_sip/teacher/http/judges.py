"""Judges that ask a server: one prompt per question, votes as samples of its answer."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_sip.teacher.http.client import ChatClient
from megatron_sip.teacher.http.config import RoleSettings
from megatron_sip.teacher.http.failures import REFUSED, REJECTED, SERVER, UNPARSABLE, Failure, kind_of
from megatron_sip.teacher.http.reply import Choice, Reply
from megatron_sip.teacher.http.templates import Template, prompt_digest, question_values
from megatron_sip.teacher.http.verdicts import FORMATS, NAN, verdict_of
from megatron_sip.teacher.interfaces import JudgeIdentity, Question, Verdict

_ASK_AGAIN = (UNPARSABLE, REFUSED, SERVER)
"""Of a completion: another sample may be better. Calls that failed were tried again by the client."""


def request_body(settings: RoleSettings, messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """A chat completion request, but for ``n``."""
    body: dict[str, Any] = {
        "model": settings.model,
        "messages": list(messages),
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_tokens": settings.max_tokens,
    }
    if settings.reasoning_effort:
        body["reasoning_effort"] = settings.reasoning_effort
    if settings.chat_template_kwargs:
        body["chat_template_kwargs"] = dict(settings.chat_template_kwargs)
    if messages[-1]["role"] == "assistant":
        # vLLM's way to let an answer go on from given words.
        body |= {"add_generation_prompt": False, "continue_final_message": True}
    return body


def identity_of(role: str, settings: RoleSettings) -> JudgeIdentity:
    """Who answers in a role: its model, and how it is sampled."""
    sampling = {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_tokens": settings.max_tokens,
        "reasoning_effort": settings.reasoning_effort,
        "structured_output": settings.structured_output,
        "chat_template_kwargs": dict(settings.chat_template_kwargs),
    }
    return JudgeIdentity(f"http-{role}", settings.model, json.dumps(sampling, sort_keys=True, default=str))


class HttpJudge:
    """Pairwise (quality, coherence) or pointwise (safety, factuality), by its criterion."""

    def __init__(
        self,
        criterion: str,
        template: Template,
        client: ChatClient,
        settings: RoleSettings,
        parse_attempts: int = 2,
        batch_votes: bool = True,
    ) -> None:
        """``batch_votes``: ask for several votes by ``n`` in one request; falls back to single requests by itself."""
        self.criterion = criterion
        self._template = template
        self._client = client
        self._settings = settings
        self._format = FORMATS[criterion]
        self._parse_attempts = parse_attempts
        # Servers refuse n > 1 at temperature 0, where all samples are equal.
        self._batch_votes = batch_votes and settings.temperature > 0
        self.counts: Counter[str] = Counter()
        """``asked_again``: verdicts asked for once more because a completion held none."""

    def identity(self) -> JudgeIdentity:
        return identity_of(self.criterion, self._settings)

    def prompt_hash(self, question: Question) -> str:
        return prompt_digest(self._messages(question))

    async def ask(self, questions: Sequence[Question]) -> list[Verdict]:
        """Questions that differ in nothing but their vote become one request where the server can."""
        alike: dict[tuple[int, tuple[int, ...]], list[int]] = defaultdict(list)
        for index, question in enumerate(questions):
            alike[id(question.group), question.options].append(index)
        answers = await asyncio.gather(
            *(self._votes(questions[indices[0]], len(indices)) for indices in alike.values())
        )
        verdicts = [Verdict(NAN)] * len(questions)
        for indices, votes in zip(alike.values(), answers, strict=True):
            for index, verdict in zip(indices, votes, strict=True):
                verdicts[index] = verdict
        return verdicts

    def _messages(self, question: Question) -> list[dict[str, str]]:
        return self._template.render(question_values(question))

    def _body(self, question: Question) -> dict[str, Any]:
        body = request_body(self._settings, self._messages(question))
        return {**body, **(self._format.structured if self._settings.structured_output else {})}

    async def _votes(self, question: Question, count: int) -> list[Verdict]:
        """``count`` samples of one prompt; those without a verdict are drawn again a few times."""
        verdicts = await self._draw(question, count)
        for _ in range(self._parse_attempts - 1):
            again = [
                i for i, (verdict, drawn) in enumerate(verdicts) if drawn and kind_of(verdict.failure) in _ASK_AGAIN
            ]
            if not again:
                break
            self.counts["asked_again"] += len(again)
            for index, new in zip(again, await self._draw(question, len(again)), strict=True):
                verdicts[index] = new
        return [verdict for verdict, _ in verdicts]

    async def _draw(self, question: Question, count: int) -> list[tuple[Verdict, bool]]:
        """``count`` verdicts, each with whether a completion came at all."""
        choices: tuple[Choice, ...] = ()
        latency = 0.0
        if count > 1 and self._batch_votes:
            reply, latency = await self._complete(question, count)
            if isinstance(reply, Reply):
                choices = reply.choices[:count]
            elif reply.kind != REJECTED:
                return [_failed(reply, latency)] * count
            if len(choices) < count:
                # It ignores n, or refuses it: single requests from now on.
                self._batch_votes = False
        verdicts = [(verdict_of(choice, self._format, latency), True) for choice in choices]
        rest = [self._draw_one(question) for _ in range(count - len(verdicts))]
        return verdicts + await asyncio.gather(*rest)

    async def _draw_one(self, question: Question) -> tuple[Verdict, bool]:
        reply, latency = await self._complete(question)
        if isinstance(reply, Reply):
            return verdict_of(reply.choices[0], self._format, latency), True
        return _failed(reply, latency)

    async def _complete(self, question: Question, count: int = 1) -> tuple[Reply | Failure, float]:
        """The answer, and its seconds from when the request had a place in flight, retries included."""
        begun = time.monotonic()

        def body() -> dict[str, Any]:
            nonlocal begun
            begun = time.monotonic()
            return self._body(question) | ({"n": count} if count > 1 else {})

        reply = await self._client.complete(body)
        return reply, time.monotonic() - begun


def _failed(failure: Failure, latency_s: float) -> tuple[Verdict, bool]:
    return Verdict(NAN, failure=str(failure), latency_s=latency_s), False
