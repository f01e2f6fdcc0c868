"""An OpenAI-compatible server on loopback that misbehaves on demand and keeps exact counts of what it did.

Used in tests through ``FaultServer``; it ends with its ``with`` block, and with the process in any case.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

HANG_S = 30.0
"""Far beyond every time-out of the tests; the server's end cuts it short."""


@dataclass
class Seen:
    """One request."""

    time_s: float
    fault: str
    body: dict[str, Any]
    headers: dict[str, str]


@dataclass
class FaultServer:
    """``faults``: what happens to request 0, 1, 2, ...; then, or without them, ``fault(number)``; "" answers well."""

    faults: Iterable[str] = ()
    fault: Callable[[int], str] = lambda number: ""
    answer: Callable[[dict[str, Any], int], str | None] = lambda body, index: "Conclusion: Option 1"
    """Request body and number of the choice -> its text."""
    delay_s: float = 0.0
    port: int = 0
    seen: list[Seen] = field(default_factory=list)
    max_open: int = 0
    models_status: int = 200
    """Of the list of models, which is ["m"]; 0 for a page in its place, -1 for six seconds of blanks."""
    most_sent: int = 0
    """Bytes of the longest answer without end, as far as it was taken."""
    connections: set[int] = field(default_factory=set)

    def __enter__(self) -> FaultServer:
        self._scripted = list(self.faults)
        self._open = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._call(self._start())
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.stop()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10.0)
        assert not self._thread.is_alive(), "the server's loop does not end"
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def counts(self) -> Counter[str]:
        """Per fault ("ok" for none), the number of requests that met it."""
        return Counter(seen.fault or "ok" for seen in self.seen)

    def stop(self) -> None:
        """Close the port at once; what is under way is cut off."""
        if self._runner is not None:
            self._call(self._stop())

    def start_again(self) -> None:
        """On the same port."""
        self._call(self._start())

    def _call(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10.0)

    async def _start(self) -> None:
        application = web.Application()
        application.router.add_post("/v1/chat/completions", self._handle)
        application.router.add_get("/v1/models", self._models)
        self._runner: web.AppRunner | None = web.AppRunner(application, shutdown_timeout=0.0, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True, backlog=2048)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def _stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()
        self._runner = None

    async def _models(self, request: web.Request) -> web.StreamResponse:
        if self.models_status < 0:
            return await self._respond(request, "trickle 6", {})
        if not self.models_status:
            return web.Response(text="<html>it works</html>", content_type="text/html")
        return web.json_response({"object": "list", "data": [{"id": "m"}]}, status=self.models_status)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        number = len(self.seen)
        fault = self._scripted[number] if number < len(self._scripted) else self.fault(number)
        self.seen.append(Seen(time.monotonic(), fault, body, dict(request.headers)))
        self.connections.add(id(request.transport))
        self._open += 1
        self.max_open = max(self.max_open, self._open)
        try:
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            return await self._respond(request, fault, body)
        finally:
            self._open -= 1

    async def _respond(self, request: web.Request, fault: str, body: dict[str, Any]) -> web.StreamResponse:
        name, _, argument = fault.partition(" ")
        if name == "hang":
            await asyncio.sleep(HANG_S)
        if name == "slow":
            await asyncio.sleep(float(argument))
        if name == "reset":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if name == "status":
            return _error(int(argument))
        if name == "retry-after":
            return web.json_response({"error": {"message": "slow down"}}, status=429, headers={"Retry-After": argument})
        if name == "too-long":
            error = {"message": "The prompt has 9000 tokens", "type": "BadRequestError", "param": "input_tokens"}
            return web.json_response({"error": error}, status=400)
        if name == "echo-key":
            return web.json_response({"error": request.headers.get("Authorization", "")}, status=401)
        text = json.dumps(self._completion(fault, body))
        if name == "garbage":
            text = "<html>it works</html>"
        if name == "truncated-json":
            text = text[: len(text) // 2]
        if name == "trickle":
            slow = web.StreamResponse(headers={"Content-Type": "application/json"})
            await slow.prepare(request)
            for _ in range(int(float(argument) / 0.1)):
                await slow.write(b" ")
                await asyncio.sleep(0.1)
            return slow
        if name == "endless":
            endless, sent = web.StreamResponse(headers={"Content-Type": "application/json"}), 0
            await endless.prepare(request)
            try:
                while True:
                    await endless.write(b" " * 2**20)
                    sent += 2**20
                    self.most_sent = max(self.most_sent, sent)
            except ConnectionError:
                return endless
        if name == "truncated-body":
            response = web.StreamResponse(
                headers={"Content-Length": str(len(text)), "Content-Type": "application/json"}
            )
            await response.prepare(request)
            await response.write(text[: len(text) // 2].encode())
            assert request.transport is not None
            request.transport.close()
            return response
        return web.Response(text=text, content_type="application/json")

    def _completion(self, fault: str, body: dict[str, Any]) -> dict[str, Any]:
        name, _, argument = fault.partition(" ")
        choices = []
        for index in range(1 if name == "ignore-n" else body.get("n", 1)):
            text = self.answer(body, index)
            message: dict[str, Any] = {"role": "assistant", "content": text}
            reason = "stop"
            if name == "reasoning":
                message = {"role": "assistant", "content": None, argument or "reasoning": text}
            if name == "null":
                message["content"] = None
            if name == "say":
                message["content"] = argument
            if name == "refusal":
                message = {"role": "assistant", "content": None, "refusal": "I will not judge this."}
            if name in ("abort", "length", "content_filter") or (name == "abort-first" and index == 0):
                reason = "abort" if name == "abort-first" else name
            choices.append({"index": index, "message": message, "finish_reason": reason})
        return {"id": "x", "object": "chat.completion", "choices": [] if name == "empty-choices" else choices}


def _error(status: int) -> web.Response:
    if status == 404:
        return web.json_response({"detail": "Not Found"}, status=404)
    error = {"message": f"scripted {status}", "type": "Error", "param": None, "code": status}
    return web.json_response({"error": error}, status=status)
