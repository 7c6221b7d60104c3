"""The frame of a tar file: where each member lies, read strictly, before anything is made of what is inside.

Python's tarfile takes a damaged header for the end of the archive and says nothing; here every byte of the frame must be as it was
written: headers with their check sum, one regular member after another, zeros to the end. Member names must be plain keys with the
ending of a block, each once, and lengths within limits, so a reader never meets a link, a path or a bomb.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from so3krates_dist.data.codec import MAX_BLOCK_BYTES
from so3krates_dist.data.verification import refuse_damaged

MEMBER_SUFFIX: Final = "safetensors"
TAR_RECORD: Final = 512
"""bytes that headers and members are padded to"""

MAX_MEMBERS: Final = 1_000_000
"""Members of a shard: their numbers have six digits"""

_CHUNK: Final = 1 << 20
_NAME: Final = re.compile(rf"([A-Za-z0-9_-]+)\.{MEMBER_SUFFIX}")
_CHECKSUM: Final = slice(148, 156)


class Member(NamedTuple):
    """One block in a tar file."""

    key: str
    offset: int
    """bytes from the start of the tar to the payload"""
    size: int
    """bytes of the payload"""


def pad(size: int) -> int:
    """Return the bytes that a member of some size takes up."""
    return -(-size // TAR_RECORD) * TAR_RECORD


def iter_members(path: Path) -> Iterator[Member]:
    """Yield the members of a shard in order, reading their headers only.

    Raises:
        DataError: The file cannot be read or is no tar of blocks that was written to its end and left as it was.
    """
    keys: set[str] = set()
    try:
        with path.open("rb", buffering=0) as file:
            total = path.stat().st_size
            position = 0
            while any(header := _read(file.read(TAR_RECORD), f"{path} at byte {position}")):
                member = _parse(header, position, total, f"{path} at byte {position}")
                if member.key in keys:
                    raise refuse_damaged(f"{path}:{member.key}", "be there once", "a second one")
                if len(keys) == MAX_MEMBERS:
                    raise refuse_damaged(str(path), f"have at most {MAX_MEMBERS} members", "more")
                keys.add(member.key)
                yield member
                position = member.offset + pad(member.size)
                file.seek(position)
            zero = all(chunk.count(0) == len(chunk) for chunk in iter(lambda: file.read(_CHUNK), b""))
    except OSError as error:
        raise refuse_damaged(str(path), "be readable", error.strerror) from error
    if not zero or total < position + 2 * TAR_RECORD:
        got = f"{total - position} bytes, {'too few' if zero else 'not all of them zero'}"
        raise refuse_damaged(f"{path} at byte {position}", "end with zeros", got)


def _read(header: bytes, where: str) -> bytes:
    if len(header) != TAR_RECORD:
        raise refuse_damaged(where, "go on with a header or zeros", f"the end of the file after {len(header)} bytes")
    return header


def _parse(header: bytes, position: int, total: int, where: str) -> Member:
    """Read the header of a member (POSIX.1-1988 `ustar`, as WebDataset's TarWriter writes it)."""
    summed = sum(header) - sum(header[_CHECKSUM]) + 8 * ord(" ")
    if header[257:263] != b"ustar\0" or _read_octal(header[_CHECKSUM]) != summed:
        raise refuse_damaged(where, "be the header of a tar member", repr(header[:32]))
    name, size = header[:100].rstrip(b"\0").decode("latin-1"), _read_octal(header[124:136])
    if header[156:157] not in (b"0", b"\0") or any(header[345:500]):
        raise refuse_damaged(f"{where} member {name!r}", "be a plain file", f"type {header[156:157]!r}")
    if (match := _NAME.fullmatch(name)) is None:
        rule = f"be called by letters, digits, _ and -, and then .{MEMBER_SUFFIX}"
        raise refuse_damaged(f"{where} member {name!r}", rule, "another name")
    if size is None or size > MAX_BLOCK_BYTES:
        raise refuse_damaged(f"{where} member {name!r}", f"have at most {MAX_BLOCK_BYTES} bytes", size)
    if position + TAR_RECORD + pad(size) > total:
        raise refuse_damaged(f"{where} member {name!r}", f"have {size} bytes", f"the end of the file at byte {total}")
    return Member(match[1], position + TAR_RECORD, size)


def _read_octal(field: bytes) -> int | None:
    text = field.rstrip(b"\0 ").lstrip(b" ")
    return int(text, 8) if re.fullmatch(rb"[0-7]+", text) else None
