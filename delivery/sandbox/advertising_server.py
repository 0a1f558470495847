"""The advertising API of this machine over HTTP.

Belongs here: the server and its connections. Does not: what is answered (``advertising_api``).
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from delivery.sandbox.advertising_api import LARGEST_BODY, AdvertisingSandbox
from delivery.sandbox.advertising_errors import Refused


class Server:
    """The sandbox over HTTP on this machine, in threads of this process; a context manager."""

    def __init__(self, sandbox: AdvertisingSandbox, port: int = 0) -> None:
        self.sandbox = sandbox
        self._http = _HttpServer(("127.0.0.1", port), _handler(sandbox))
        self.port = int(self._http.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}/"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), name="advertising", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until it is closed (for a process that does nothing else)."""
        self._thread.join()

    def close(self) -> None:
        """Stop answering; open connections are cut. The sandbox itself stays usable."""
        self._http.shutdown()
        self._http.server_close()
        self._http.cut()
        self._thread.join()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(sandbox: AdvertisingSandbox, port: int = 0) -> Server:
    """Serve on 127.0.0.1; port 0: a free one, see ``url``."""
    return Server(sandbox, port)


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._open: set[socket.socket] = set()
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news; anything else is printed by the base class."""
        import sys

        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError | ValueError | OSError):
            super().handle_error(request, client_address)

    def cut(self) -> None:
        for one in list(self._open):
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # it is closed already


def _handler(sandbox: AdvertisingSandbox) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        timeout = 120

        def _do(self) -> None:
            length = self.headers.get("content-length", "0")
            if not length.isdigit() or int(length) > LARGEST_BODY or self.headers.get("transfer-encoding"):
                self.close_connection = True
                self._send(400, sandbox.refused(Refused(400, message="Request payload size is not acceptable.")))
                return
            content = self.rfile.read(int(length))
            headers = {name.lower(): value for name, value in self.headers.items()}
            try:
                status, body = sandbox.answer(self.command, self.path, headers, content)
            except ConnectionAbortedError:
                self.close_connection = True
                return
            self._send(status, body)

        def _send(self, status: int, body: Mapping[str, Any]) -> None:
            content = json.dumps(body, separators=(",", ":")).encode()
            head = f"HTTP/1.1 {status} {self.responses.get(status, ('',))[0]}\r\n"
            head += f"Content-Type: application/json; charset=UTF-8\r\nContent-Length: {len(content)}\r\n\r\n"
            self.wfile.write(head.encode() + content)

        do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _do

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing is logged: a header could hold the token."""

    return Handler
