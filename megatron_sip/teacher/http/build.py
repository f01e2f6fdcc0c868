"""TeacherConfig -> judges and rewriter over HTTP. The only module of this folder that knows all others."""

from __future__ import annotations

import os
from collections import Counter

from megatron_sip.errors import ConfigurationError
from megatron_sip.teacher.config import TeacherConfig
from megatron_sip.teacher.http.client import ChatClient, ClientSettings
from megatron_sip.teacher.http.corrupter import HttpCorrupter
from megatron_sip.teacher.http.judges import HttpJudge
from megatron_sip.teacher.http.rewriter import HttpRewriter
from megatron_sip.teacher.http.templates import load_template


class HttpTeacher:
    """Makes judges and rewriter; roles that share their endpoints share a client, its limits and connections."""

    def __init__(self, config: TeacherConfig, replica: int = 0, num_replicas: int = 1, replaying: bool = False) -> None:
        """``replica`` of ``num_replicas``: the run-wide rate limit is split over them evenly.

        ``replaying``: judges and rewriter say what they would ask, and nobody is asked; endpoints are not needed.
        """
        self._config = config
        self._replica = replica
        self._replaying = replaying
        self._num_replicas = num_replicas
        self._clients: dict[tuple[str, ...], ChatClient] = {}
        self._judges: list[HttpJudge] = []
        self._num_groups = len({endpoints for endpoints in self._endpoints_of_roles()})

    def judge(self, criterion: str) -> HttpJudge:
        """Raises ConfigurationError if endpoints, model or template are missing."""
        config = self._config
        name = f"factuality_{config.factuality_variant}" if criterion == "factuality" else criterion
        judge = HttpJudge(
            criterion,
            load_template(name, config.judge_prompts),
            self._client(criterion),
            config.role_settings(criterion, config.judge_votes),
            parse_attempts=config.judge_parse_attempts,
            batch_votes=config.judge_vote_requests == "n",
        )
        self._judges.append(judge)
        return judge

    def rewriter(self) -> HttpRewriter:
        """Raises ConfigurationError if endpoints, model or template are missing."""
        config = self._config
        return HttpRewriter(
            load_template("rewriter", config.judge_prompts),
            self._client("rewriter"),
            config.role_settings("rewriter", 1),
            attempts=config.judge_parse_attempts,
            prefill=config.rewriter_prefill,
        )

    def corrupter(self) -> HttpCorrupter:
        """Raises ConfigurationError if endpoints, model or template are missing."""
        config = self._config
        return HttpCorrupter(
            load_template("corruption", config.judge_prompts),
            self._client("corrupter"),
            config.role_settings("corrupter", 1),
            attempts=config.judge_parse_attempts,
        )

    def counts(self) -> Counter[str]:
        """What the clients and judges have counted since the start."""
        parts = [client.counts for client in self._clients.values()] + [judge.counts for judge in self._judges]
        total: Counter[str] = Counter()
        for part in parts:
            total.update(part)
        for client in self._clients.values():
            total["breaker_opened"] += sum(endpoint.times_opened for endpoint in client.endpoints)
        return total

    async def aclose(self) -> None:
        for client in self._clients.values():
            await client.close()

    def _endpoints_of_roles(self) -> list[tuple[str, ...]]:
        roles = self._config.http_roles()
        return [self._config.role_settings(role, votes).endpoints for role, votes in roles.items()]

    def _client(self, role: str) -> ChatClient:
        config = self._config
        if missing := config.missing_http({role: 1}, self._replaying):
            raise ConfigurationError(missing[0])
        urls = tuple(url.rstrip("/") for url in config.role_settings(role, 1).endpoints)
        if self._replaying:
            urls = ("http://replayed.invalid/v1",)
        if urls not in self._clients:
            settings = ClientSettings(
                max_in_flight=config.judge_max_in_flight,
                connect_timeout_s=config.judge_connect_timeout_s,
                read_timeout_s=config.judge_read_timeout_s,
                request_timeout_s=config.judge_request_timeout_s,
                give_up_s=config.judge_give_up_s,
                max_attempts=config.judge_max_attempts,
                backoff_s=config.judge_backoff_s,
                max_backoff_s=config.judge_max_backoff_s,
                breaker_failures=config.judge_breaker_failures,
                breaker_pause_s=config.judge_breaker_pause_s,
                # One limit for the whole run, whatever asks: split over replicas and over clients.
                rate_per_s=config.judge_rate_limit / self._num_replicas / max(1, self._num_groups),
                hedge_percentile=config.judge_hedge_percentile,
                seed=self._replica,
            )
            self._clients[urls] = ChatClient(urls, settings, os.environ.get(config.judge_api_key_env, ""))
        return self._clients[urls]
