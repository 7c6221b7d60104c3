"""One request for a file over http or https, judged: what will not get better is an error, what may is `Interrupted`.

The standard library with two time limits of its own: one until the connection stands, one between any two portions of bytes. A
server may be as slow as it likes while bytes come. Proxies are those of the environment. Redirects are followed a few times, to
http(s) only and never from https to http. Addresses that a server redirects to are not shown: they may be signed.
"""

import contextlib
import functools
import http.client
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPMessage
from typing import IO, Any, Final

from so3krates_dist.errors import DataError

MAX_REDIRECTS: Final = 5
_CHUNK: Final = 1 << 20
_TRANSIENT: Final = frozenset({408, 425, 429})
"""statuses below 500 that a server answers when it is busy"""
_HTML: Final = (b"<!doctype html", b"<html")


class Interrupted(Exception):  # noqa: N818 - not an error yet: the transfer is tried again
    """A transfer that did not end but may when it is tried again.

    Args:
        got: What happened.
        wait_s: Seconds that the server asks to wait; 0 where it says nothing.
        anew: Start at the first byte.
    """

    def __init__(self, got: str, *, wait_s: float = 0.0, anew: bool = False) -> None:
        super().__init__(got)
        self.wait_s, self.anew = wait_s, anew


def iter_body(url: str, start: int, size: int | None, timeouts: tuple[float, float]) -> Iterator[tuple[int, bytes]]:
    """Request a file and yield its bytes as they come, each portion with its place in the file.

    Args:
        url: Address, without user, password or query.
        start: First byte that is wanted; a server that cannot do that sends the file from its beginning.
        size: Length of the whole file where it is known, in bytes.
        timeouts: Seconds until a connection must stand, and seconds between two portions of bytes.

    Raises:
        Interrupted: The server is busy or gone, the body was cut, or no byte came for too long.
        DataError: The file is not there, may not be read, or is another one.
    """
    with contextlib.closing(_open(url, start, timeouts)) as response:
        position = _find_start(url, response, start)
        end = None if response.length is None else position + response.length
        if end is not None and size is not None and end != size:
            _refuse_html(url, response, b"")
            raise DataError(url, f"have {size} bytes as the manifest says", end, "Copy the file there again")
        while chunk := _read(response, timeouts[1]):
            if position == 0:
                _refuse_html(url, response, chunk)
            yield position, chunk
            position += len(chunk)
        if end is not None and position < end:
            raise Interrupted(f"a body cut at byte {position} of {end}")


def _open(url: str, start: int, timeouts: tuple[float, float]) -> http.client.HTTPResponse:
    connect, stall = timeouts
    headers = {"User-Agent": "so3krates-dist", "Accept-Encoding": "identity"}
    request = urllib.request.Request(url, headers=headers | ({"Range": f"bytes={start}-"} if start else {}))
    try:
        response: http.client.HTTPResponse = _build_opener(stall).open(request, timeout=connect)
    except urllib.error.HTTPError as error:
        with error:
            raise _judge_status(url, error) from None
    except urllib.error.URLError as error:  # until the request was sent
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            remedy = "Check the address, or name the certificates of your site in SSL_CERT_FILE"
            raise DataError(
                url, "have a certificate that can be verified", error.reason.verify_message, remedy
            ) from None
        late = isinstance(error.reason, TimeoutError)
        raise Interrupted(f"no connection within {connect:g} s" if late else _describe(error.reason)) from None
    except TimeoutError:
        raise Interrupted(f"no byte for {stall:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        raise Interrupted(_describe(error)) from None
    return response


def _read(response: http.client.HTTPResponse, stall: float) -> bytes:
    try:
        return response.read1(_CHUNK)
    except TimeoutError:
        raise Interrupted(f"no byte for {stall:g} s") from None
    except (
        OSError,
        http.client.HTTPException,
        ValueError,
    ) as error:  # ValueError: a length of a chunk that is no number
        raise Interrupted(_describe(error)) from None


def _describe(error: object) -> str:
    """Say in a few words what went wrong with a connection; nothing that a server has sent."""
    return getattr(error, "strerror", None) or type(error).__name__


def _judge_status(url: str, error: urllib.error.HTTPError) -> Exception:
    status = f"HTTP {error.code} {http.client.responses.get(error.code, '')}".rstrip()
    if error.code >= 500 or error.code in _TRANSIENT:
        wait = error.headers.get("Retry-After", "")
        return Interrupted(status, wait_s=float(wait) if wait.isascii() and wait.isdigit() else 0.0)
    if error.code == 416:  # what is there is shorter than what came already
        return Interrupted(status, anew=True)
    if error.code in (404, 410):
        return DataError(url, "exist", status, "Check the address")
    if error.code in (401, 403, 407):
        return DataError(url, "be open to everybody", status, "Check the address, or use s3:// with credentials")
    if 300 <= error.code < 400:
        rule = f"lead to a file in at most {MAX_REDIRECTS} redirects, to http(s) only and never from https to http"
        return DataError(url, rule, status, "Give the address that the file is downloaded from")
    return DataError(url, "be a file that can be read", status, "Check the address")


def _find_start(url: str, response: http.client.HTTPResponse, start: int) -> int:
    """Return the place of the body's first byte in the file."""
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise DataError(url, "be sent as it is", f"Content-Encoding {encoding}", "Change the server's settings")
    if response.status == 200:
        return 0
    place = response.headers.get("Content-Range", "")
    if response.status == 206 and place.startswith(f"bytes {start}-"):
        return start
    got = f"HTTP {response.status}, Content-Range {place!r}"
    raise DataError(url, "be answered with its bytes", got, "Copy the data set to another server")


def _refuse_html(url: str, response: http.client.HTTPResponse, head: bytes) -> None:
    is_html = response.headers.get_content_type() == "text/html" or head.lstrip()[:16].lower().startswith(_HTML)
    if is_html:
        remedy = "Give the address that the files are downloaded from, not that of a page about them"
        raise DataError(url, "be a file of a data set", "an HTML page", remedy)


class _Connection(http.client.HTTPConnection):
    """A connection that has another time limit once it stands."""

    def __init__(self, *args: Any, stall: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stall = stall

    def connect(self) -> None:
        super().connect()
        self.sock.settimeout(self._stall)


class _SecureConnection(http.client.HTTPSConnection):
    """The same with TLS, whose handshake belongs to connecting."""

    def __init__(self, *args: Any, stall: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stall = stall

    def connect(self) -> None:
        super().connect()
        self.sock.settimeout(self._stall)


class _Handler(urllib.request.HTTPHandler):
    def __init__(self, stall: float) -> None:
        super().__init__()
        self._stall = stall

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(functools.partial(_Connection, stall=self._stall), req)


class _SecureHandler(urllib.request.AbstractHTTPHandler):
    """Opens https; the certificates to trust are read with each request, not before there is one."""

    https_request = urllib.request.AbstractHTTPHandler.do_request_

    def __init__(self, stall: float) -> None:
        super().__init__()
        self._stall = stall

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        trusted = ssl.create_default_context()
        return self.do_open(functools.partial(_SecureConnection, stall=self._stall), req, context=trusted)


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = max_repeats = MAX_REDIRECTS

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        target = newurl.partition(":")[0].lower()
        if target == "https" or (target == "http" and req.type == "http"):
            return super().redirect_request(req, fp, code, msg, headers, newurl)
        raise urllib.error.HTTPError(req.full_url, code, msg, headers, fp)


def _build_opener(stall: float) -> urllib.request.OpenerDirector:
    """Return what opens http and https, and nothing else: no file, ftp or data addresses."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(), _Handler(stall), _SecureHandler(stall), _Redirects(),
        urllib.request.HTTPDefaultErrorHandler(), urllib.request.HTTPErrorProcessor(),
    ):  # fmt: skip
        opener.add_handler(handler)
    return opener
