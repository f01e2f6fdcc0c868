"""Asks each endpoint for its list of models before training: what is wrong is then said at once, and not after the
time-outs of the first questions. Nothing is refused: a server may be started after the run."""

from __future__ import annotations

import http.client
import json
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping

from megatron_sip.teacher.http.config import HttpOptions

_TIMEOUT_S = 3.0
_PATIENCE_S = 4.0
_MOST_BYTES = 1 << 20


def complaints(options: HttpOptions, roles: Mapping[str, int], api_key: str) -> list[str]:
    """One line per endpoint that does not answer as it should. ``roles``: those asked over HTTP, with their votes."""
    models: dict[str, set[str]] = {}
    for role, votes in roles.items():
        settings = options.role_settings(role, votes)
        for url in settings.endpoints:
            models.setdefault(url.rstrip("/"), set()).add(settings.model)
    late = f"has not listed its models within {_PATIENCE_S:g} s: look at its log; the run asks on"
    found = dict.fromkeys(models, late)

    def greet(url: str) -> None:
        found[url] = _complaint(url, models[url], api_key, options.judge_api_key_env)

    # Time-outs of sockets do not bound an answer that trickles: who is late is left behind, with its thread.
    threads = [threading.Thread(target=greet, args=(url,), daemon=True) for url in models]
    end = time.monotonic() + _PATIENCE_S
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return [f"judge endpoint {url} {text}" for url, text in found.items() if text]


def _complaint(url: str, models: set[str], api_key: str, key_name: str) -> str:
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
        hint = " (a server of http?)" if isinstance(reason, ssl.SSLError) else ""
        return f"does not answer ({reason}){hint}: start it, or give another of --judge-endpoints; the run asks on"
    return _of_list(body, models)


def _of_status(url: str, status: int, key_name: str) -> str:
    if status in (401, 403):
        return f"refuses the key (HTTP {status}): put it into the environment variable {key_name} (--judge-api-key-env)"
    if status == 404:
        # Not all servers have this route; most have it below /v1.
        return "" if url.endswith("/v1") else "has no /models (HTTP 404): does the URL lack its /v1?"
    return f"answers with HTTP {status}: look at its log; the run asks on"


def _of_list(body: bytes, models: set[str]) -> str:
    try:
        served = {str(model["id"]) for model in json.loads(body)["data"]}
    except (ValueError, KeyError, TypeError):
        return "answers with something else than a list of models: is it an OpenAI-compatible server?"
    unknown = ", ".join(sorted(models - served))
    return (
        f"serves {', '.join(sorted(served)) or 'nothing'}, not {unknown}: see --judge-served-model" if unknown else ""
    )
