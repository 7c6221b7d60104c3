"""A web server on loopback that misbehaves on request: what remote data sets are tested against."""

import contextlib
import dataclasses
import functools
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclasses.dataclass
class Loopback:
    """What the server has, what it does instead of serving it, and what it was asked for."""

    url: str = ""
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    """content by path, `/set/name`"""
    faults: dict[str, list["Fault"]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    """what answers the next requests of a path, one after another"""
    requests: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    """path and `Range` header of each request"""
    over: threading.Event = dataclasses.field(default_factory=threading.Event)
    """set when the test is over, so that nobody stalls on"""

    def add_folder(self, folder: Path, name: str = "set") -> str:
        """Serve the files of a folder; return its address."""
        self.files |= {f"/{name}/{p.name}": p.read_bytes() for p in folder.iterdir()}
        return f"{self.url}/{name}"


class Request(BaseHTTPRequestHandler):
    def __init__(self, state: Loopback, *args, **kwargs) -> None:
        self.state = state
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        self.state.requests.append((self.path, self.headers.get("Range", "")))
        body = self.state.files.get(self.path)
        faults = self.state.faults[self.path]
        with contextlib.suppress(ConnectionError):
            if faults:
                faults.pop(0)(self, body or b"")
            elif body is None:
                self.answer(404)
            else:
                self.serve(body)

    def serve(self, body: bytes) -> None:
        asked = self.headers.get("Range")
        first, _, last = (asked or "").removeprefix("bytes=").partition("-")
        start, end = int(first or 0), min(int(last or len(body)) + 1, len(body))
        if start and start >= len(body):
            self.answer(416)
        elif asked:
            self.answer(206, body[start:end], **{"Content-Range": f"bytes {start}-{end - 1}/{len(body)}"})
        else:
            self.answer(200, body)

    def answer(self, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
        """Send a whole answer; `length`: what is said instead of the length of the body, -1 for nothing."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        length = len(body) if length is None else length
        if length >= 0:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


Fault = Callable[[Request, bytes], None]


def status(code: int, **headers: str) -> Fault:
    return lambda request, _: request.answer(code, b"<p>an explanation</p>", **headers)


def cut(at: int, *, with_length: bool) -> Fault:
    """Close the connection in the middle of the body."""

    def fault(request: Request, body: bytes) -> None:
        request.answer(200, body[:at], len(body) if with_length else -1)

    return fault


def cut_chunked(request: Request, body: bytes) -> None:
    """Close the connection in the middle of a body that comes in chunks."""
    request.send_response(200)
    request.send_header("Transfer-Encoding", "chunked")
    request.end_headers()
    request.wfile.write(b"%x\r\n%s\r\n%x\r\n%s" % (10, body[:10], 100, body[10:20]))


def stall(at: int) -> Fault:
    """Send the beginning of the body, and then nothing; a negative number sends not even a status."""

    def fault(request: Request, body: bytes) -> None:
        if at >= 0:
            request.answer(200, body[:at], len(body))
            request.wfile.flush()
        request.state.over.wait(30)

    return fault


def slow(portions: int, pause_s: float) -> Fault:
    """Send the body in portions with a pause before each."""

    def fault(request: Request, body: bytes) -> None:
        request.answer(200, b"", len(body))
        size = -(-len(body) // portions)
        for start in range(0, len(body), size):
            time.sleep(pause_s)
            request.wfile.write(body[start : start + size])
            request.wfile.flush()

    return fault


def redirect(target: str) -> Fault:
    return lambda request, _: request.answer(302, Location=target)


def serve_instead(body: bytes, length: int | None = None, **headers: str) -> Fault:
    return lambda request, _: request.answer(200, body, length, **headers)


def ignore_range(request: Request, body: bytes) -> None:
    request.answer(200, body)


class Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Keep quiet about clients that have had enough."""


@contextlib.contextmanager
def serve(context: ssl.SSLContext | None = None) -> Iterator[Loopback]:
    """Run a server until the end of the block; with a context over TLS."""
    state = Loopback()
    with Server(("127.0.0.1", 0), functools.partial(Request, state)) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        state.url = f"http{'' if context is None else 's'}://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield state
        finally:
            state.over.set()
            server.shutdown()
            thread.join()
