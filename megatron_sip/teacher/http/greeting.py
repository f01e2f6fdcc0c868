"""Asks each endpoint for its list of models before training: what is wrong is then said at once, and not after the
time-outs of the first questions. ``waiting`` waits for servers that are still starting, and refuses a role
that nobody can serve."""

from __future__ import annotations

import http.client
import json
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_sip.teacher.http.config import HttpOptions

_TIMEOUT_S = 3.0
_PATIENCE_S = 4.0
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Greeting:
    """How an endpoint met the question for its models."""

    problem: str = ""
    """What is wrong, with the remedy; "" if nothing is."""
    usable: bool = True
    """Whether questions may be answered all the same: not every server has such a list."""
    may_come: bool = False
    """Whether it may become usable by itself, as a server does that loads its model."""
    served: frozenset[str] | None = None
    """Names of its models, where it lists them."""


@dataclass(frozen=True)
class Greetings:
    """What all endpoints of a run have answered."""

    complaints: tuple[str, ...]
    """One line per endpoint that does not answer as it should."""
    unserved: tuple[str, ...]
    """Of the roles without a usable endpoint, one line per endpoint."""
    may_come: bool
    """Whether every such role has an endpoint that may become usable by itself."""


def greet(options: HttpOptions, roles: Mapping[str, int], api_key: str) -> Greetings:
    """Asks all endpoints at once. ``roles``: those asked over HTTP, with their votes."""
    asked = {role: options.role_settings(role, votes) for role, votes in roles.items()}
    needs = {role: ([url.rstrip("/") for url in own.endpoints], own.model) for role, own in asked.items()}
    models: dict[str, set[str]] = {}
    for urls, model in needs.values():
        for url in urls:
            models.setdefault(url, set()).add(model)
    found = _ask_all(list(models), api_key, options.judge_api_key_env)
    problems = {url: found[url].problem or _unknown(found[url], models[url]) for url in models}
    lines = {url: f"judge endpoint {url} {text}" for url, text in problems.items() if text}
    unserved: dict[str, None] = {}
    may_come = True
    for urls, model in needs.values():
        if any(found[url].usable and not _unknown(found[url], {model}) for url in urls):
            continue
        unserved |= dict.fromkeys(lines[url] for url in urls)
        may_come = may_come and any(found[url].may_come for url in urls)
    return Greetings(tuple(lines.values()), tuple(unserved), may_come)


def complaints(options: HttpOptions, roles: Mapping[str, int], api_key: str) -> list[str]:
    """One line per endpoint that does not answer as it should."""
    return list(greet(options, roles, api_key).complaints)


def _ask_all(urls: list[str], api_key: str, key_name: str) -> dict[str, Greeting]:
    late = Greeting(f"has not listed its models within {_PATIENCE_S:g} s: look at its log", False, True)
    found = dict.fromkeys(urls, late)

    def ask(url: str) -> None:
        found[url] = _ask(url, api_key, key_name)

    # Time-outs of sockets do not bound an answer that trickles: who is late is left behind, with its thread.
    threads = [threading.Thread(target=ask, args=(url,), daemon=True) for url in urls]
    end = time.monotonic() + _PATIENCE_S
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return dict(found)


def _ask(url: str, api_key: str, key_name: str) -> Greeting:
    request = urllib.request.Request(f"{url}/models", headers={"Authorization": f"Bearer {api_key}"} if api_key else {})
    # The client that asks the questions knows no proxies either.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_TIMEOUT_S) as response:
            body = response.read(_MOST_BYTES)
    except urllib.error.HTTPError as error:
        return _of_status(url, error.code, key_name)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        of_tls = isinstance(reason, ssl.SSLError)
        hint = " (a server of http?)" if of_tls else ""
        text = f"does not answer ({reason}){hint}: start it, or give another of --judge-endpoints"
        return Greeting(text, usable=False, may_come=not of_tls)
    return _of_list(body)


def _of_status(url: str, status: int, key_name: str) -> Greeting:
    if status in (401, 403):
        text = f"refuses the key (HTTP {status}): put it into the environment variable {key_name} (--judge-api-key-env)"
        # A key may be good for questions and not for the list.
        return Greeting(text, usable=status == 403)
    if status == 404:
        # Not all servers have this route; most have it below /v1.
        return Greeting("" if url.endswith("/v1") else "has no /models (HTTP 404): does the URL lack its /v1?")
    is_starting = status >= 500
    return Greeting(f"answers with HTTP {status}: look at its log", usable=not is_starting, may_come=is_starting)


def _of_list(body: bytes) -> Greeting:
    try:
        return Greeting(served=frozenset(str(model["id"]) for model in json.loads(body)["data"]))
    except (ValueError, KeyError, TypeError):
        return Greeting("answers with something else than a list of models: is it an OpenAI-compatible server?")


def _unknown(greeting: Greeting, models: set[str]) -> str:
    """What is wrong if the endpoint does not serve all of ``models``; "" where it lists none."""
    served = greeting.served
    # Ollama lists NAME:latest and answers to NAME.
    missing = set() if served is None else {name for name in models if not {name, f"{name}:latest"} & served}
    if served is None or not missing:
        return ""
    unknown = ", ".join(sorted(missing))
    return f"serves {', '.join(sorted(served)) or 'nothing'}, not {unknown}: see --judge-served-model"
