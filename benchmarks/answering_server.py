"""A chat completions server that answers every request after a fixed time and does nothing else, for load tests.

    python benchmarks/answering_server.py --delay-ms 50 [--core 1] [--seconds 600]

Prints its port. It reads no more of a request than its length, so that one core of it outruns any client.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
from typing import Any

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_BODY = (
    b'{"id":"x","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"message":{"role":"assistant",'
    b'"content":"Both go on from the prefix; the first repeats itself less and keeps to the facts.\\n\\n'
    b'Conclusion: Option 1"},"finish_reason":"stop"}],"usage":{"prompt_tokens":900,"completion_tokens":24,'
    b'"total_tokens":924}}'
)
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(_BODY) + _BODY


class Answering(asyncio.Protocol):
    """One connection. Requests of a connection come one after another."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._head = bytearray()
        self._missing = 0
        """Bytes of the body under way that are still to come; 0 between requests."""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()

    def data_received(self, data: bytes) -> None:
        if not self._missing:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            found = _LENGTH.search(self._head, 0, end)
            length = int(found.group(1)) if found else 0
            self._missing = length - (len(self._head) - end - 4)
            self._head.clear()
        else:
            self._missing -= len(data)
        if self._missing <= 0:
            self._missing = 0
            self._loop.call_later(self._delay_s, self._answer)

    def _answer(self) -> None:
        if not self._transport.is_closing():
            self._transport.write(_ANSWER)


async def serve(delay_s: float, seconds: float) -> None:
    """On loopback, until the time is over."""
    server = await asyncio.get_running_loop().create_server(
        lambda: Answering(delay_s), "127.0.0.1", 0, backlog=4096, reuse_address=True
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.sleep(seconds)
    server.close()


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--delay-ms", type=float, default=50.0, help="from the last byte of a request to its answer [50]"
    )
    parser.add_argument("--core", type=int, help="the only core to run on [any]")
    parser.add_argument("--seconds", type=float, default=600.0, help="ends by itself after this time [600]")
    arguments = parser.parse_args()
    if arguments.core is not None:
        os.sched_setaffinity(0, {arguments.core})
    asyncio.run(serve(arguments.delay_ms / 1000, arguments.seconds))


if __name__ == "__main__":
    main()
