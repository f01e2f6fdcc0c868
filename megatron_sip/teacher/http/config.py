"""Options of a teacher that is asked over HTTP."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any
from urllib.parse import urlsplit

from megatron_sip.config.fields import option
from megatron_sip.errors import ConfigurationError

FACTUALITY_VARIANTS = (*(f"reference_v{i}" for i in range(1, 6)), *(f"v{i}" for i in range(1, 5)))
ROLES = ("quality", "safety", "factuality", "coherence", "rewriter", "corrupter")
REWRITER_TOKENS = 256
"""Enough for a suffix of 128 tokens in most other vocabularies."""


@dataclass(frozen=True)
class RoleSettings:
    """How one judge, or the rewriter, is asked. ``--judge-settings ROLE.NAME=VALUE`` changes one of these."""

    model: str
    endpoints: tuple[str, ...]
    temperature: float
    top_p: float
    max_tokens: int
    votes: int
    reasoning_effort: str
    """"" leaves the server's default."""
    structured_output: bool
    chat_template_kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class HttpOptions:
    """Judges and rewriter behind OpenAI-compatible endpoints."""

    judge_endpoints: tuple[str, ...] = option(
        (), help="base URLs of the servers, each with its /v1; requests go to the least busy one", metavar="URL"
    )
    judge_served_model: str = option("", help="model name to ask these servers for")
    judge_temperature: float = option(1.0, help="sampling temperature of judges and rewriter")
    judge_top_p: float = option(1.0, help="top_p of judges and rewriter")
    judge_max_tokens: int = option(2048, help="tokens that a judge may write, reasoning included")
    judge_reasoning_effort: str = option("", help="low, medium or high, for models that know it [the server's]")
    judge_chat_template_kwargs: Mapping[str, Any] = option(
        default_factory=dict, help="arguments of the chat template, such as enable_thinking=false", metavar="NAME=X"
    )
    judge_structured_output: bool = option(
        False, help="let the server force the form of verdicts (vLLM structured_outputs, response_format)"
    )
    judge_settings: Mapping[str, Any] = option(
        default_factory=dict,
        help="settings of one role: quality.temperature=0.7 safety.model=NAME rewriter.max_tokens=200; roles: "
        + ", ".join(ROLES),
        metavar="ROLE.NAME=X",
    )
    judge_prompts: str = option("", help="directory of prompt templates that replace ours of the same file name")
    factuality_variant: str = option(
        "reference_v4", help="prompt of the factuality judge, from strict to lenient", choices=FACTUALITY_VARIANTS
    )
    judge_vote_requests: str = option(
        "n", help="votes of one question: n in one request where the server has it, or single requests",
        choices=("n", "single"),
    )  # fmt: skip
    rewriter_prefill: bool = option(
        True, help="let the rewriter's answer go on from the prefix's last words (vLLM); off for gpt-oss"
    )
    judge_parse_attempts: int = option(2, help="times to ask for a verdict that cannot be parsed before it is missing")
    judge_api_key_env: str = option("JUDGE_API_KEY", help="environment variable that holds the servers' API key")
    judge_max_in_flight: int = option(512, help="requests under way per data-parallel replica")
    judge_start_wait_s: float = option(
        300.0, help="seconds to wait at the start for servers that do not answer yet; 0: none, that is an error at once"
    )
    judge_connect_timeout_s: float = option(10.0, help="seconds to connect")
    judge_read_timeout_s: float = option(180.0, help="seconds of silence before an attempt fails")
    judge_request_timeout_s: float = option(240.0, help="seconds of one attempt")
    judge_give_up_s: float = option(480.0, help="seconds of one request with all its attempts")
    judge_max_attempts: int = option(6, help="attempts of one request; only transient failures are tried again")
    judge_backoff_s: float = option(0.5, help="upper limit of the first pause between attempts; doubles each time")
    judge_max_backoff_s: float = option(30.0, help="upper limit of every pause between attempts")
    judge_breaker_failures: int = option(5, help="failures in a row after which an endpoint is left alone for a while")
    judge_breaker_pause_s: float = option(1.0, help="first such pause; doubles up to 30 s while probes fail")
    judge_rate_limit: float = option(0.0, help="requests per second of the whole run; 0: unlimited")
    judge_hedge_percentile: float = option(
        0.0, help="requests slower than this percentile of the last 1,000 are sent once more; 0: none"
    )

    def role_settings(self, role: str, votes: int) -> RoleSettings:
        """Of a judge (its criterion), ``rewriter`` or ``corrupter``. Raises ConfigurationError for what cannot work."""
        settings = RoleSettings(
            model=self.judge_served_model,
            endpoints=self.judge_endpoints,
            temperature=self.judge_temperature,
            top_p=self.judge_top_p,
            max_tokens=REWRITER_TOKENS if role == "rewriter" else self.judge_max_tokens,
            votes=1 if role in ("rewriter", "corrupter") else votes,
            reasoning_effort=self.judge_reasoning_effort,
            structured_output=self.judge_structured_output,
            chat_template_kwargs=self.judge_chat_template_kwargs,
        )
        changes = {}
        for key, value in self.judge_settings.items():
            owner, _, name = key.partition(".")
            _check_setting(key, owner, name)
            if owner == role:
                changes[name] = _converted(key, value, getattr(settings, name))
        settings = replace(settings, **changes)
        _check_role(role, settings)
        return settings

    def validate_http(self, roles: Mapping[str, int], timeout_s: float) -> None:
        """``roles``: those asked over HTTP, with their votes. What may be given later is ``missing_http``."""
        for role, votes in roles.items():
            self.role_settings(role, votes)
        for name in ("judge_max_in_flight", "judge_max_attempts", "judge_parse_attempts", "judge_breaker_failures"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{_flag(name)} is {getattr(self, name)}: give at least 1")
        if not self.judge_start_wait_s >= 0:
            raise ConfigurationError(f"judge-start-wait-s is {self.judge_start_wait_s}: give 0 or more seconds")
        seconds = {f.name for f in fields(HttpOptions) if f.name.endswith("_s")} - {"judge_start_wait_s"}
        for name in sorted(seconds):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{_flag(name)} is {getattr(self, name)}: give a number of seconds above 0")
        if roles and self.judge_give_up_s >= timeout_s:
            raise ConfigurationError(
                f"judge-give-up-s is {self.judge_give_up_s:g}, judge-timeout-s {timeout_s:g}: the run stops before "
                "a request counts as failed; make judge-give-up-s the smaller"
            )
        if not self.judge_rate_limit >= 0:
            raise ConfigurationError(f"judge-rate-limit is {self.judge_rate_limit}: give 0 or more")
        if not 0 <= self.judge_hedge_percentile < 100:
            raise ConfigurationError(f"judge-hedge-percentile is {self.judge_hedge_percentile}: give 0 to below 100")

    def missing_http(self, roles: Mapping[str, int], replaying: bool = False) -> list[str]:
        """What a run needs and does not have yet, one line each. ``replaying``: nobody is asked."""
        missing = []
        for role, votes in roles.items():
            settings = self.role_settings(role, votes)
            if not settings.endpoints and not replaying:
                missing.append(
                    f"--judge-endpoints: none for {role}; start a server (vllm serve) and give http://HOST:PORT/v1"
                )
            if not settings.model:
                missing.append(f"--judge-served-model: none for {role}; give the name the server was started with")
        if self.judge_prompts and not os.path.isdir(self.judge_prompts):
            missing.append(f"--judge-prompts: no directory {self.judge_prompts}")
        return missing


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _check_setting(key: str, role: str, name: str) -> None:
    names = [field.name for field in fields(RoleSettings)]
    if role not in ROLES or name not in names:
        raise ConfigurationError(
            f"judge-settings has no {key!r}: write ROLE.NAME with a role of {', '.join(ROLES)} and a name of "
            f"{', '.join(names)}"
        )


def _converted(key: str, value: Any, former: Any) -> Any:
    """``value`` in the type of the setting it replaces."""
    if isinstance(former, tuple):
        urls = [value] if isinstance(value, str) else value
        if isinstance(urls, list | tuple) and all(isinstance(url, str) for url in urls):
            return tuple(urls)
    elif isinstance(former, bool) or isinstance(value, bool):
        if isinstance(former, bool) and isinstance(value, bool):
            return value
    elif isinstance(former, float) and isinstance(value, int | float):
        return float(value)
    elif isinstance(former, Mapping) and isinstance(value, Mapping):
        return dict(value)
    elif isinstance(value, type(former)):
        return value
    raise ConfigurationError(f"judge-settings {key} is {value!r}: give a value like {former!r}")


def _check_role(role: str, settings: RoleSettings) -> None:
    if not settings.temperature >= 0:
        raise ConfigurationError(f"temperature of {role} is {settings.temperature}: give 0 or more")
    if not 0 < settings.top_p <= 1:
        raise ConfigurationError(f"top_p of {role} is {settings.top_p}: give a share above 0, at most 1")
    for name in ("max_tokens", "votes"):
        if getattr(settings, name) < 1:
            raise ConfigurationError(f"{name} of {role} is {getattr(settings, name)}: give at least 1")
    for url in settings.endpoints:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigurationError(f"judge-endpoints has {url!r}: give URLs like http://HOST:8000/v1")
        if parts.username or parts.password:
            raise ConfigurationError(
                "judge-endpoints has a URL with a password in it, which logs would show: put the key into the "
                "environment variable of judge-api-key-env"
            )
