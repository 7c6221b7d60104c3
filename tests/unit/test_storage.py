"""Files of a data set over http(s): what is delivered, what is refused at once, what is tried again, and for how long."""

import contextlib
import datetime
import hashlib
import ipaddress
import os
import pickle
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import loopback
import pytest
from loopback import Loopback
from storage_setup import SECRET, SHARD, fetch, list_cache, make_settings

from so3krates_dist.data import storage
from so3krates_dist.data.storage import StorageSettings, open_storage
from so3krates_dist.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("short_waits")


# Where a data set may be


@pytest.mark.parametrize(
    "location", ["pipe:cat x", "file:///etc", "gs://bucket/x", "ftp://host/x", "data:,x", "PIPE:x"]
)
def test_other_addresses_are_refused(location):
    scheme = location.partition(":")[0].lower()
    with pytest.raises(
        DataError, match=rf"a data set must be a folder or http://.*; got one of the kind `{scheme}:`. Give a"
    ):
        open_storage(location)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        (f"https://me:{SECRET}@host/set", "https://host must hold no user or password; got an address with one"),
        (f"s3://{SECRET}@bucket/set", "s3://bucket must hold no user or password; got an address with one"),
        (f"http://me:{SECRET}@[::1/set", "an address http://... must have a valid host and port; got another (not shown)"),
        (f"http://host:{SECRET}/set", "an address http://... must have a valid host and port; got another (not shown)"),
        (f"https://host/set?sig={SECRET}", "https://host must be a plain address; got one with a query or a fragment"),
        (f"http:/me:{SECRET}@host", "http:// must name a host; got none. Check the address."),
        ("s3:bucket", "s3:// must name a bucket; got none. Check the address."),
        ("http://host/a set", "http://host must be an address in ASCII without blanks; got others. Write other characters as"),
    ],
)  # fmt: skip
def test_addresses_that_are_wrong_or_hold_a_secret_are_refused_without_showing_it(location, message):
    with pytest.raises(DataError) as caught:
        open_storage(location)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_folder_is_read_in_place(tmp_path):
    (tmp_path / "a:b").mkdir()
    (tmp_path / "a:b" / "manifest.json").write_text("{}")
    place = open_storage(str(tmp_path / "a:b"))
    assert place.read_text("manifest.json") == "{}"
    assert fetch(place) == tmp_path / "a:b" / "a.tar"
    with pytest.raises(DataError, match=r"none.json must be readable; got No such file or directory. Check the folder"):
        place.read_text("none.json")
    with pytest.raises(DataError, match=r"a.tar must be there when it is opened; got no such file 5 times"):
        place.open_file("a.tar", size=1, sha256="0" * 64)
    (tmp_path / "a:b" / "b.tar").symlink_to("b.tar")
    with pytest.raises(DataError, match=r"a:b/b.tar must be readable; got Too many levels"):
        place.open_file("b.tar", size=1, sha256="0" * 64)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "", ".hidden", "a b", "a?b", "a%2fb", "a\n"])
@pytest.mark.parametrize("location", ["folder", "http://127.0.0.1:9/set", "s3://bucket/set"])
def test_names_cannot_lead_elsewhere(tmp_path, location, name):
    place = open_storage(location, make_settings(tmp_path))
    for use in (place.read_text, lambda n: place.fetch(n, size=1, sha256="0" * 64)):
        with pytest.raises(DataError, match=r"must hold files whose names are letters, digits, `.`, `_` and `-`; got"):
            use(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache_bytes": 0}, "data.cache_gb must be greater than zero and finite; got 0"),
        ({"connect_timeout_s": float("nan")}, "data.connect_timeout must be greater than zero and finite; got nan"),
        ({"stall_timeout_s": float("inf")}, "data.stall_timeout must be greater than zero and finite; got inf"),
        ({"retries": -1}, "data.retries must be zero or greater; got -1"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(ConfigError, match=message):
        StorageSettings(**change)


# Delivery over http


def test_a_file_is_fetched_once_and_found_again(server, tmp_path):
    place = pickle.loads(pickle.dumps(open_storage(f"{server.url}/set/", make_settings(tmp_path))))
    assert place.read_text("manifest.json") == '{"name": "x"}'
    path = fetch(place)
    assert path.name == "a.tar"
    assert path.read_bytes() == SHARD
    before = path.stat()
    assert fetch(place) == path
    assert [p for p, _ in server.requests] == ["/set/manifest.json", "/set/a.tar"]
    assert path.stat().st_mtime_ns == before.st_mtime_ns, "marks of verified files stay valid"
    assert path.stat().st_atime_ns > before.st_atime_ns
    assert list_cache(tmp_path) == {"a.tar"}
    path.write_bytes(SHARD[:-1])
    assert fetch(place).read_bytes() == SHARD, "a copy of another length is fetched anew"
    descriptor = place.open_file("a.tar", size=len(SHARD), sha256=hashlib.sha256(SHARD).hexdigest())
    assert os.pread(descriptor, 5, 1000) == SHARD[1000:1005]
    os.close(descriptor)


RECOVERED = {
    "503 twice": ([loopback.status(503), loopback.status(503)], ["", "", ""]),
    "429 that says when to come again": ([loopback.status(429, Retry_After="1")], ["", ""]),
    "cut with a length": ([loopback.cut(150_000, with_length=True)], ["", "bytes=150000-"]),
    "cut without a length": ([loopback.cut(150_000, with_length=False)], ["", "bytes=150000-"]),
    "cut in a chunk": ([loopback.cut_chunked], ["", "bytes=20-"]),
    "cut twice": ([loopback.cut(1000, with_length=True)] * 2, ["", "bytes=1000-", "bytes=1000-"]),
    "cut, then no parts of files": (
        [loopback.cut(150_000, with_length=True), loopback.ignore_range],
        ["", "bytes=150000-"],
    ),
    "cut, then a range that is too far": (
        [loopback.cut(150_000, with_length=True), loopback.status(416)],
        ["", "bytes=150000-", ""],
    ),
    "stall before the status": ([loopback.stall(-1)], ["", ""]),
    "stall in the body": ([loopback.stall(150_000)], ["", "bytes=150000-"]),
    "slow but steady": ([loopback.slow(8, 0.15)], [""]),
    "redirects": ([loopback.redirect("/set/b.tar")], ["", ""]),
    "wrong bytes once": ([loopback.serve_instead(bytes(len(SHARD)))], ["", ""]),
    "a right part and a wrong one": (
        [loopback.cut(100, with_length=True), lambda request, body: request.serve(body[:100] + bytes(len(body) - 100))],
        ["", "bytes=100-", ""],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RECOVERED)
def test_what_a_transfer_survives(server, tmp_path, case):
    faults, ranges = RECOVERED[case]
    server.faults["/set/a.tar"] = list(faults)
    server.files["/set/b.tar"] = SHARD
    limit = {"slow but steady": 1.0}.get(case, 0.3 if "stall" in case else 10.0)
    path = fetch(open_storage(f"{server.url}/set", make_settings(tmp_path, stall_timeout_s=limit)))
    assert path.read_bytes() == SHARD
    asked = [r for _, r in server.requests]
    # The operating system may take a little less than what was sent before the cut.
    assert [bool(r) for r in asked] == [bool(r) for r in ranges]
    assert asked == ranges or "150000" in str(ranges)
    assert list_cache(tmp_path) == {"a.tar"}


REFUSED = {
    "404": (1, loopback.status(404), "must exist; got HTTP 404 Not Found. Check the address."),
    "403": (1, loopback.status(403), "must be open to everybody; got HTTP 403 Forbidden. Check the address, or use s3://"),
    "400": (1, loopback.status(400), "must be a file that can be read; got HTTP 400 Bad Request. Check the address."),
    "503": (3, loopback.status(503),
            "must be delivered within 3 attempts; got HTTP 503 Service Unavailable. Look after the server and the network, or"),
    "500": (3, loopback.status(500), "must be delivered within 3 attempts; got HTTP 500 Internal Server Error. Look"),
    "cut with a length": (3, lambda r, b: r.answer(200, b[:1], len(b)), "got a body cut at byte 1 of 200000. Look after"),
    "cut without a length": (3, loopback.cut(7, with_length=False), "got a body cut at byte 7 of 200000. Look after"),
    "stall before the status": (3, loopback.stall(-1), "must be delivered within 3 attempts; got no byte for 0.3 s. Look"),
    "stall in the body": (3, loopback.stall(5), "must be delivered within 3 attempts; got no byte for 0.3 s. Look"),
    "longer": (1, loopback.serve_instead(SHARD + b"x"),
               "must have 200000 bytes as the manifest says; got 200001. Copy the file there again."),
    "longer without a length": (1, loopback.serve_instead(SHARD + b"x", -1),
                                "must have 200000 bytes; got 200001 bytes and more. Copy the file there again."),
    "shorter": (1, loopback.serve_instead(SHARD[:-1]), "must have 200000 bytes as the manifest says; got 199999. Copy"),
    "other bytes": (2, loopback.serve_instead(bytes(len(SHARD))),
                    "of the manifest; got 4cbbd9be0cba..., twice. Copy the file there again, or make the data set anew."),
    "page by its type": (1, loopback.serve_instead(b"<p>Log in!</p>", Content_Type="text/html; charset=utf-8"),
                         "must be a file of a data set; got an HTML page. Give the address that the files are downloaded"),
    "page by its bytes": (1, loopback.serve_instead(b"\n<!DOCTYPE html>".ljust(len(SHARD))), "got an HTML page. Give"),
    "packed": (1, loopback.serve_instead(SHARD, Content_Encoding="gzip"),
               "must be sent as it is; got Content-Encoding gzip. Change the server's settings."),
    "no content": (1, loopback.status(204), "must be answered with its bytes; got HTTP 204, Content-Range ''. Copy"),
    "redirected in a circle": (6, loopback.redirect(f"/set/a.tar?{SECRET}"), "must lead to a file in at most 5 redirects"),
    "redirected to a file": (1, loopback.redirect("file:///etc/passwd"), "to http(s) only and never from https to http; got "
                             "HTTP 302 Found. Give the address that the file is downloaded from."),
    "redirected with a password": (3, loopback.redirect(f"http://me:{SECRET}@host/"), "got InvalidURL. Look after"),
    "no http": (3, lambda r, b: r.wfile.write(f"{SECRET}\r\n\r\n".encode()), "got BadStatusLine. Look after"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_ends_a_transfer(server, tmp_path, case):
    num_requests, fault, message = REFUSED[case]
    settings = make_settings(tmp_path, stall_timeout_s=0.3 if "stall" in case else 10.0)
    for name in ("/set/a.tar", f"/set/a.tar?{SECRET}"):
        server.faults[name] = [fault] * 10
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        fetch(open_storage(f"{server.url}/set", settings))
    assert time.monotonic() - start < 5, "seconds to the verdict"
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{server.url}/set/a.tar must ")
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(server.requests) == num_requests
    assert list_cache(tmp_path) == set()


TEXTS = {
    "page": (loopback.serve_instead(b"<html><title>Log in</title>", Content_Type="text/html"), "got an HTML page"),
    "cut": (loopback.cut(3, with_length=True), "got a body cut at byte 3 of 13"),
    "too long": (loopback.serve_instead(bytes(65)), "must have at most 64 bytes; got 65 bytes and more. Copy"),
    "no text": (loopback.serve_instead(b"\xff\xfe"), "manifest.json must be text in UTF-8; got 'utf-8' codec"),
    "missing": (loopback.status(404), "must exist; got HTTP 404 Not Found"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_manifest_that_is_none(server, tmp_path, monkeypatch, case):
    monkeypatch.setattr(storage, "MAX_TEXT_BYTES", 64)
    fault, message = TEXTS[case]
    server.faults["/set/manifest.json"] = [fault] * 9
    with pytest.raises(DataError, match=message):
        open_storage(f"{server.url}/set", make_settings(tmp_path)).read_text("manifest.json")
    assert all(asked == "" for _, asked in server.requests), "without a hash no two halves are put together"


def test_a_server_that_is_not_there(tmp_path, free_port):
    place = open_storage(f"http://127.0.0.1:{free_port}/set", make_settings(tmp_path))
    with pytest.raises(DataError, match=r"must be delivered within 3 attempts; got Connection refused. Look after"):
        fetch(place)


def test_a_connection_that_does_not_stand_in_time(tmp_path):
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):  # more than wait to be accepted; the rest gets no answer
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        settings = make_settings(tmp_path, connect_timeout_s=0.2, stall_timeout_s=30, retries=1)
        start = time.monotonic()
        with pytest.raises(DataError, match=r"within 2 attempts; got no connection within 0.2 s"):
            fetch(open_storage(f"http://127.0.0.1:{listener.getsockname()[1]}/set", settings))
        assert time.monotonic() - start < 10


def test_waits_grow_up_to_a_limit(server, tmp_path, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.5)
    server.faults["/set/a.tar"] = [loopback.status(503)] * 8 + [loopback.status(503, Retry_After="20")]
    fetch(open_storage(f"{server.url}/set", make_settings(tmp_path, retries=9)))
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    waits.clear()
    (tmp_path / "other").mkdir()
    server.faults["/set/a.tar"] = [loopback.status(503, Retry_After=t) for t in ("20", "99999", "soon", "Fri, 31 Dec")]
    fetch(open_storage(f"{server.url}/set", make_settings(tmp_path / "other", retries=9)))
    assert waits == [20, 30, 2, 4]


def test_a_proxy_of_the_environment_is_used(server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    server.files["http://data.invalid/set/manifest.json"] = b"{}"
    assert open_storage("http://data.invalid/set", make_settings(tmp_path)).read_text("manifest.json") == "{}"


# https


@pytest.fixture
def secure(server, tmp_path) -> Iterator[tuple[Loopback, Path]]:
    """The same server over TLS, and its certificate, which nobody has signed."""
    pytest.importorskip("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "loopback")])
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "key.pem").write_bytes(private)
    path = tmp_path / "certificate.pem"
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, tmp_path / "key.pem")
    with loopback.serve(context) as state:
        yield state, path


def test_https_needs_a_certificate_that_can_be_verified(secure, server, tmp_path, monkeypatch):
    state, certificate = secure
    state.files["/set/manifest.json"] = b"{}"
    place = open_storage(f"{state.url}/set", make_settings(tmp_path))
    with pytest.raises(
        DataError, match=r"must have a certificate that can be verified; got self-signed certificate. Check"
    ):
        place.read_text("manifest.json")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert place.read_text("manifest.json") == "{}"
    state.faults["/set/manifest.json"] = [loopback.redirect(f"{server.url}/set/manifest.json")]
    with pytest.raises(DataError, match=r"to http.s. only and never from https to http; got HTTP 302 Found. Give"):
        place.read_text("manifest.json")
    state.faults["/set/manifest.json"] = [loopback.stall(1)] * 9
    impatient = open_storage(f"{state.url}/set", make_settings(tmp_path, stall_timeout_s=0.3, retries=0))
    with pytest.raises(DataError, match=r"must be delivered within 1 attempt; got no byte for 0.3 s"):
        impatient.read_text("manifest.json")
