"""Where the files of a data set are: a folder, a web server or an S3 store, behind one small interface.

Remote files are fetched whole into a bounded cache on a disk of this machine, once for all of its processes, and checked: length,
sha256. A transfer that breaks goes on where it stopped, a few times; a server that is silent for too long counts as broken. Other
kinds of addresses, commands among them, are refused, and so are addresses that hold a password. No message shows a secret.
"""

import abc
import dataclasses
import hashlib
import io
import math
import os
import re
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

from so3krates_dist.data.cache import Cache, find_cache_folder
from so3krates_dist.data.http_files import Interrupted, iter_body
from so3krates_dist.data.manifest import MAX_TEXT_BYTES, read_text
from so3krates_dist.errors import ConfigError, DataError

FIRST_WAIT_S: Final = 0.5
"""seconds before the second attempt; each further wait is twice as long"""
MAX_WAIT_S: Final = 30.0
_S3_CHUNK: Final = 16 << 20
_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_OPEN_TRIES: Final = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class StorageSettings:
    """How remote files are fetched and kept."""

    cache: Path | None = None
    """folder for copies; None: in the user's cache folder"""
    cache_bytes: int = 50_000_000_000
    """bytes that all copies together may hold"""
    connect_timeout_s: float = 10.0
    """seconds until a connection must stand"""
    stall_timeout_s: float = 60.0
    """seconds that may pass without a byte"""
    retries: int = 5
    """further attempts after the first one"""

    def __post_init__(self) -> None:
        """Check the values; messages name the settings as a config does."""
        for name, value in (
            ("data.cache_gb", self.cache_bytes),
            ("data.connect_timeout", self.connect_timeout_s),
            ("data.stall_timeout", self.stall_timeout_s),
        ):
            if not 0 < value < math.inf:
                raise ConfigError(name, "be greater than zero and finite", value, "Change the value")
        if self.retries < 0:
            raise ConfigError("data.retries", "be zero or greater", self.retries, "Change the value")


class Storage(abc.ABC):
    """The files of one data set. Travels to other processes without connections.

    Args:
        location: Folder or address of the data set.
    """

    def __init__(self, location: str) -> None:
        self.location = location

    def address(self, name: str) -> str:
        """Return where a file is, for messages."""
        return f"{self.location}/{name}"

    def read_text(self, name: str) -> str:
        """Return the content of a file that is not kept: it is read anew every time.

        Raises:
            DataError: The file is missing, cannot be read, is too large or no text.
        """
        try:
            return self._read_bytes(_check_name(self.location, name)).decode()
        except UnicodeDecodeError as error:
            raise DataError(self.address(name), "be text in UTF-8", str(error), "Copy the file there again") from error

    @abc.abstractmethod
    def fetch(self, name: str, *, size: int, sha256: str) -> Path:
        """Return where a file is on this machine, after fetching it where it was not there.

        Args:
            name: Name of the file, without folders.
            size: Its length in bytes.
            sha256: Hexadecimal digits; compared when the file is fetched. Of a file in a folder neither is compared here.

        Raises:
            DataError: The file is missing, cannot be read, or is another one.
            ConfigError: The file is larger than the cache.
        """

    @abc.abstractmethod
    def _read_bytes(self, name: str) -> bytes:
        """Return the content of a small file."""

    def open_file(self, name: str, *, size: int, sha256: str) -> int:
        """Fetch a file and return a descriptor for reading it, which keeps its bytes when the cache drops the copy.

        Raises:
            DataError: See `fetch`.
        """
        for _ in range(_OPEN_TRIES):
            path = self.fetch(name, size=size, sha256=sha256)
            try:
                return os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                continue  # another process needed the room at this moment
            except OSError as error:
                raise DataError(self.address(name), "be readable", error.strerror, "Change its permissions") from error
        rule, remedy = "be there when it is opened", "Check the folder, or raise data.cache_gb"
        raise DataError(self.address(name), rule, f"no such file {_OPEN_TRIES} times", remedy)


class LocalStorage(Storage):
    """A folder of this machine."""

    def fetch(self, name: str, *, size: int, sha256: str) -> Path:
        """Return the path of the file itself."""
        return Path(self.location) / _check_name(self.location, name)

    def _read_bytes(self, name: str) -> bytes:
        return read_text(Path(self.location) / name)


class RemoteStorage(Storage):
    """What web servers and S3 stores have in common: attempts, checks and the cache.

    Args:
        location: Address of the data set.
        settings: Time limits, attempts, cache.
    """

    def __init__(self, location: str, settings: StorageSettings) -> None:
        super().__init__(location)
        self.settings = settings

    @abc.abstractmethod
    def _iter_body(self, url: str, start: int, size: int | None) -> Iterator[tuple[int, bytes]]:
        """Yield the bytes of a file from `start` or from its beginning, each portion with its place; one attempt."""

    def _read_bytes(self, name: str) -> bytes:
        buffer = io.BytesIO()
        self._receive(_Part(self.address(name), buffer, None))
        return buffer.getvalue()

    def fetch(self, name: str, *, size: int, sha256: str) -> Path:
        """Return the copy in the cache, after making it where there is none."""
        url = self.address(_check_name(self.location, name))

        def receive(file: BinaryIO) -> None:
            for _ in range(2):
                part = _Part(url, file, size)
                self._receive(part)
                if part.digest.hexdigest() == sha256:
                    return
            found = f"{part.digest.hexdigest()[:12]}..., twice"
            rule = f"have the sha256 {sha256[:12]}... of the manifest"
            raise DataError(url, rule, found, "Copy the file there again, or make the data set anew")

        folder = self.settings.cache or find_cache_folder()
        return Cache(folder, self.settings.cache_bytes).fetch(name, size, sha256, receive)

    def _receive(self, part: "_Part") -> None:
        """Receive a whole file in as many attempts as are allowed."""
        attempts, last = self.settings.retries + 1, ""
        for attempt in range(attempts):
            try:
                for place, chunk in self._iter_body(part.url, part.num_bytes, part.size):
                    part.append(place, chunk)
                part.check_end()
                return
            except Interrupted as error:
                last = str(error)
                if part.size is None or error.anew:  # without a hash nothing tells that two halves belong together
                    part.restart()
                if attempt + 1 < attempts:
                    time.sleep(min(max(FIRST_WAIT_S * 2**attempt, error.wait_s), MAX_WAIT_S))
        raise DataError(
            part.url, f"be delivered within {attempts} attempt{'s' * (attempts > 1)}", last,
            "Look after the server and the network, or raise data.retries, data.connect_timeout or data.stall_timeout",
        )  # fmt: skip


class HttpStorage(RemoteStorage):
    """A folder of a web server."""

    def _iter_body(self, url: str, start: int, size: int | None) -> Iterator[tuple[int, bytes]]:
        return iter_body(url, start, size, (self.settings.connect_timeout_s, self.settings.stall_timeout_s))


class S3Storage(RemoteStorage):
    """A prefix of an S3 bucket.

    Credentials, region and endpoint are those of the AWS tools (AWS_PROFILE, AWS_ENDPOINT_URL, ...). Where there are no
    credentials the bucket is read anonymously.
    """

    def __init__(self, location: str, settings: StorageSettings) -> None:
        super().__init__(location, settings)
        self._anonymous = False
        self._connected: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Travel to another process without the connection."""
        return {**self.__dict__, "_connected": None}

    def _connect(self) -> Any:
        """Return s3fs's file system of this process, made on first use: it does not survive a fork."""
        if self._connected is None or self._connected[0] != os.getpid():
            try:
                import s3fs
            except ModuleNotFoundError as error:
                remedy = "Install it with `pip install 'so3krates-dist[s3]'`"
                raise DataError(self.location, "be read with s3fs", "an installation without it", remedy) from error
            limits = {
                "connect_timeout": self.settings.connect_timeout_s,
                "read_timeout": self.settings.stall_timeout_s,
                "retries": {"total_max_attempts": 1},  # attempts are counted here, alike for all servers
            }
            filesystem = s3fs.S3FileSystem(
                anon=self._anonymous, config_kwargs=limits, skip_instance_cache=True, use_listings_cache=False
            )
            filesystem.retries = 1
            self._connected = os.getpid(), filesystem
        return self._connected[1]

    def _iter_body(self, url: str, start: int, size: int | None) -> Iterator[tuple[int, bytes]]:
        position = start
        while size is None or position < size:
            end = position + _S3_CHUNK if size is None else min(position + _S3_CHUNK, size)
            chunk = self._read_range(url, position, end)
            yield position, chunk
            position += len(chunk)
            if position < end:
                if size is None:
                    return
                raise DataError(url, f"have {size} bytes as the manifest says", position, "Copy the file there again")

    def _read_range(self, url: str, start: int, end: int) -> bytes:
        try:
            chunk: bytes = self._connect().cat_file(url.removeprefix("s3://"), start=start, end=end)
        except DataError:
            raise
        except Exception as error:  # s3fs lets errors of botocore, aiohttp and the system through as they come
            if type(error).__name__ == "NoCredentialsError" and not self._anonymous:
                self._anonymous, self._connected = True, None
                return self._read_range(url, start, end)
            if (code := _find_code(error)[0]) == "InvalidRange":  # an empty file, or the end of one
                return b""
            raise _judge_s3(url, error, code, self.settings) from None
        return chunk


def _find_code(error: Exception) -> tuple[str, int]:
    """Return the store's own name for what went wrong and the HTTP status; empty and 0 where it did not answer."""
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
    if not isinstance(response, dict):
        return "", 0
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return str(response.get("Error", {}).get("Code", "")), int(status)


def _judge_s3(url: str, error: Exception, code: str, settings: StorageSettings) -> Exception:
    """Return what to raise: `Interrupted` where another attempt may do better."""
    import aiohttp
    import botocore.exceptions as boto

    status = _find_code(error)[1]
    busy = status >= 500 or status in (408, 429) or code in ("SlowDown", "RequestTimeout", "RequestTimeTooSkewed")
    name = code or type(error).__name__
    if busy:
        return Interrupted(f"{name} (HTTP {status})")
    if status == 404 or isinstance(error, FileNotFoundError):
        return DataError(url, "exist", name, "Check the bucket and the path")
    if status in (401, 403):
        return DataError(url, "be readable with these credentials", name, "Check AWS_PROFILE and the bucket's policy")
    if isinstance(error, boto.ConnectTimeoutError):
        return Interrupted(f"no connection within {settings.connect_timeout_s:g} s")
    if isinstance(error, boto.ReadTimeoutError | TimeoutError):
        return Interrupted(f"no byte for {settings.stall_timeout_s:g} s")
    broken = (boto.HTTPClientError, boto.ConnectionError, boto.ResponseStreamingError, aiohttp.ClientError, OSError)
    if status == 0 and isinstance(error, broken):
        return Interrupted(name)
    return DataError(url, "be readable with the AWS settings of this machine", name, "Check them with `aws s3 ls`")


class _Part:
    """A file that is being received: what came of it, and the hash of that."""

    def __init__(self, url: str, file: BinaryIO, size: int | None) -> None:
        self.url, self.file, self.size = url, file, size
        self.restart()

    def restart(self) -> None:
        self.file.seek(0)
        if self.size is None:
            self.file.truncate()
        self.num_bytes = 0
        self.digest = hashlib.sha256()

    def append(self, place: int, chunk: bytes) -> None:
        if place != self.num_bytes:  # the server does not do parts of files
            self.restart()
        self.num_bytes += len(chunk)
        if self.num_bytes > (MAX_TEXT_BYTES if self.size is None else self.size):
            rule = f"have at most {MAX_TEXT_BYTES} bytes" if self.size is None else f"have {self.size} bytes"
            raise DataError(self.url, rule, f"{self.num_bytes} bytes and more", "Copy the file there again")
        self.digest.update(chunk)
        self.file.write(chunk)

    def check_end(self) -> None:
        if self.size is not None and self.num_bytes < self.size:
            raise Interrupted(f"a body cut at byte {self.num_bytes} of {self.size}")


def _check_name(location: str, name: str) -> str:
    if not _NAME.fullmatch(name):
        rule = "hold files whose names are letters, digits, `.`, `_` and `-`"
        raise DataError(location, rule, repr(name), "Make the data set anew")
    return name


def _check_address(location: str, scheme: str) -> str:
    """Return an address without its last slashes; refuse what may hold a secret, without showing it."""
    parts = _split(location, scheme)
    shown = f"{scheme}://{parts.hostname or ''}"
    if "@" in parts.netloc:
        remedy = "Leave them out; s3:// uses the credentials of the AWS tools"
        raise DataError(shown, "hold no user or password", "an address with one (not shown)", remedy)
    if "?" in location or "#" in location:
        remedy = "Give the folder that the files are in"
        raise DataError(shown, "be a plain address", "one with a query or a fragment (not shown)", remedy)
    if not parts.hostname or not location.lower().startswith(f"{scheme}://"):
        raise DataError(shown, f"name a {'bucket' if scheme == 's3' else 'host'}", "none", "Check the address")
    if not location.isascii() or not location.isprintable() or " " in location:
        raise DataError(shown, "be an address in ASCII without blanks", "others", "Write other characters as %XX")
    return f"{scheme}{location[len(scheme) :].rstrip('/')}"


def _split(location: str, scheme: str) -> urllib.parse.SplitResult:
    try:
        parts = urllib.parse.urlsplit(location)
        if "@" not in parts.netloc:
            parts.port  # noqa: B018 - raises where it is none
    except ValueError:  # whose text shows parts of the address
        where = f"an address {scheme}://..."
        raise DataError(where, "have a valid host and port", "another (not shown)", "Check the address") from None
    return parts


def open_storage(location: str, settings: StorageSettings | None = None) -> Storage:
    """Return the files of a data set, wherever they are.

    Args:
        location: Folder, `http://...`, `https://...` or `s3://bucket/prefix`.
        settings: Time limits, attempts and cache of remote files; None: as they are by default.

    Raises:
        DataError: The address is of another kind, not valid, or holds a password.
    """
    match = _SCHEME.match(location)
    if match is None:
        return LocalStorage(location)
    scheme = match.group(1).lower()
    if scheme not in ("http", "https", "s3"):
        remedy = "Give a folder (./name where it has a colon), or one of these addresses"
        raise DataError(
            "a data set", "be a folder or http://, https:// or s3://", f"one of the kind `{scheme}:`", remedy
        )
    address = _check_address(location, scheme)
    return (S3Storage if scheme == "s3" else HttpStorage)(address, settings or StorageSettings())
