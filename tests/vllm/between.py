"""An HTTP proxy between a run and its server, to do something to the server at a known call."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class Between:
    """Passes everything on to ``target``, which may be exchanged."""

    def __init__(self, target: str) -> None:
        self.target = target
        self._plans: dict[str, tuple[int, Callable[[], None]]] = {}
        between = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                between._pass_on(self)

            def do_POST(self) -> None:
                between._pass_on(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def plan(self, path: str, number: int, act: Callable[[], None]) -> None:
        """``act`` is called before the ``number``-th call of ``path`` from now is passed on."""
        self._plans[path] = (number, act)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _pass_on(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        path = handler.path.partition("?")[0]
        if path in self._plans:
            left, act = self._plans.pop(path)
            if left > 1:
                self._plans[path] = (left - 1, act)
            else:
                act()
        connection = http.client.HTTPConnection(urlsplit(self.target).netloc, timeout=300)
        try:
            connection.request(handler.command, handler.path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException):
            handler.close_connection = True  # without an answer, as the server
            return
        finally:
            connection.close()
        handler.send_response(answer.status)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)
