"""What becomes of damaged shards: a table of ways to damage one, and of ways to read it, and each damage is found and named.

WebDataset takes a damaged header for the end of the archive, so it loses half a shard without a word in several of these cases; the
last column of the table that is printed shows it, for comparison.
"""

import gzip
import itertools
import os
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
import webdataset
from analytic import make_random_graph, write_graphs

from so3krates_dist.data import shards
from so3krates_dist.data.archive import iter_members
from so3krates_dist.errors import DataError

NUM_BLOCKS, BLOCK_SIZE = 5, 10
SHARD = "train-000000.tar"


def write_set(folder: Path, num: int = NUM_BLOCKS * BLOCK_SIZE) -> shards.Manifest:
    graphs = [make_random_graph(i) for i in range(num)]
    return write_graphs(folder, {"train": graphs}, block_size=BLOCK_SIZE, blocks_per_shard=NUM_BLOCKS)


# ------------------------------------------------------------------------------------------------------- ways to damage


def cut_at(content: bytes, position: int) -> bytes:
    return content[:position]


def change_at(content: bytes, position: int, new: bytes) -> bytes:
    return content[:position] + new + content[position + len(new) :]


def flip_at(content: bytes, position: int) -> bytes:
    return change_at(content, position, bytes([content[position] ^ 4]))


def rebuild(content: bytes, change: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]]) -> bytes:
    """Return a valid tar of other members."""
    target = BytesIO()
    with tarfile.open(fileobj=BytesIO(content)) as source:
        members = [(m.name, source.extractfile(m).read()) for m in source.getmembers()]
    with tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, payload in change(members):
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, BytesIO(payload))
    return target.getvalue()


def rename(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    return [(f"train.{k}.safetensors", payload) for k, (_, payload) in enumerate(members)]


def interleave(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """Put the rest of each sample after the start of the next one."""
    halves = [
        ((name, p[: len(p) // 2]), (name.replace("safetensors", "rest"), p[len(p) // 2 :])) for name, p in members
    ]
    return [
        halves[0][0],
        *(part for a, b in itertools.pairwise(halves) for part in (b[0], a[1])),
        halves[-1][1],
    ]


def link(content: bytes) -> bytes:
    target = BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        info = tarfile.TarInfo("train-000000-000000.safetensors")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    return target.getvalue()


def claim_size(content: bytes, position: int, size: int) -> bytes:
    """Give the member whose header is at a position another size, with the check sum that belongs to it."""
    header = bytearray(content[position : position + 512])
    header[124:136] = f"{size:011o}\0".encode()
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return change_at(content, position, bytes(header))


HTML = b"<html><body>404 not found</body></html>\n" * 40

DAMAGES: dict[str, Callable[[bytes, list[int], list[int]], bytes]] = {
    # name: from the bytes, the places of the headers and those of the payloads
    "cut at a member boundary": lambda c, h, p: cut_at(c, h[3]),
    "cut inside a header": lambda c, h, p: cut_at(c, h[3] + 200),
    "flipped header byte": lambda c, h, p: flip_at(c, h[2] + 3),
    "zeroed check sum": lambda c, h, p: change_at(c, h[2] + 148, bytes(8)),
    "512 zero bytes in the middle": lambda c, h, p: change_at(c, h[2], bytes(512)),
    "512 zero bytes in a payload": lambda c, h, p: change_at(c, p[2] + 1024, bytes(512)),
    "cut inside a payload": lambda c, h, p: cut_at(c, p[3] + 700),
    "payload bit flip": lambda c, h, p: flip_at(c, p[3] - 1 + 1500),
    "bit flip in a block's table": lambda c, h, p: flip_at(c, p[3] + 40),
    "two swapped members": lambda c, h, p: rebuild(c, lambda m: [m[0], m[2], m[1], *m[3:]]),
    "truncated to nothing": lambda c, h, p: b"",
    "duplicate member": lambda c, h, p: rebuild(c, lambda m: [m[0], m[1], *m[1:]]),
    "member of the same name later": lambda c, h, p: rebuild(c, lambda m: [*m[:4], (m[0][0], m[4][1])]),
    "missing member": lambda c, h, p: rebuild(c, lambda m: [*m[:2], *m[3:]]),
    "dotted keys": lambda c, h, p: rebuild(c, rename),
    "interleaved members": lambda c, h, p: rebuild(c, interleave),
    "HTML page instead of a tar": lambda c, h, p: HTML,
    "compressed": lambda c, h, p: gzip.compress(c),
    "a link instead of a member": lambda c, h, p: link(c),
    "path in a name": lambda c, h, p: rebuild(c, lambda m: [(f"../{m[0][0]}", m[0][1]), *m[1:]]),
    "member longer than the file": lambda c, h, p: claim_size(c, h[2], 10**8),
    "member over the limit": lambda c, h, p: claim_size(c, h[2], 2**31),
    "longer than it was": lambda c, h, p: c + bytes(512),
    "appended garbage": lambda c, h, p: c + os.urandom(2048),
    "end cut off": lambda c, h, p: cut_at(c, p[4] + (h[1] - p[0])),
}  # fmt: skip


def find_places(path: Path) -> tuple[list[int], list[int]]:
    members = list(iter_members(path))
    return [m.offset - 512 for m in members], [m.offset for m in members]


# --------------------------------------------------------------------------------------------------------- ways to read


def check_hashes(folder: Path) -> None:
    shards.check_dataset(folder, hashes=True)


def read_blocks(folder: Path) -> None:
    with shards.open_dataset(folder, verify="sha256") as dataset:
        for block in dataset.iter_blocks("train"):
            assert len(block) == BLOCK_SIZE


def read_in_sequence(folder: Path) -> None:
    for entry in shards.load_manifest(folder).shards:
        for _ in shards.iter_shard(folder / entry.file, entry):
            pass


def read_without_manifest(folder: Path) -> None:
    """All that is known is the file."""
    for _ in shards.iter_shard(folder / SHARD):
        pass


def describe_webdataset(folder: Path) -> str:
    """Return what WebDataset alone makes of the shard: no manifest, no decoder of ours."""
    try:
        count = sum(1 for _ in webdataset.WebDataset([str(folder / SHARD)], shardshuffle=False))
    except Exception as error:  # whatever it is, the table shows it
        return f"{type(error).__name__}"
    return f"{count} of {NUM_BLOCKS} samples, silently"


READERS = {"hashes": check_hashes, "blocks": read_blocks, "sequence": read_in_sequence}


def find_error(read: Callable[[Path], None], folder: Path) -> Exception | None:
    try:
        read(folder)
    except Exception as error:  # whatever it is, the table shows it
        return error
    return None


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SO3KRATES_CACHE_DIR", str(tmp_path / "cache"))


def test_a_whole_shard_is_read_in_every_way(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    for read in (*READERS.values(), read_without_manifest):
        assert find_error(read, tmp_path / "set") is None
    assert describe_webdataset(tmp_path / "set") == "5 of 5 samples, silently"


def test_every_damage_is_found_and_named(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    path = tmp_path / "set" / SHARD
    content, places = path.read_bytes(), find_places(path)
    undetected, unnamed, bare, lines = [], [], set(), []
    for name, damage in DAMAGES.items():
        path.write_bytes(damage(content, *places))
        assert path.read_bytes() != content, name
        found = {reader: find_error(read, tmp_path / "set") for reader, read in READERS.items()}
        undetected += [f"{name}: {reader}" for reader, error in found.items() if error is None]
        unnamed += [
            f"{name}: {reader}: {error!r}"
            for reader, error in found.items()
            if not isinstance(error, DataError) or not error.where.startswith(str(path)) or "\n" in str(error)
        ]
        alone, vendor = find_error(read_without_manifest, tmp_path / "set"), describe_webdataset(tmp_path / "set")
        bare |= {name} if alone is not None else set()
        lines.append(f"{name:32} {found['sequence'] is not None!s:8} {alone is not None!s:16} {vendor}")
    print(f"\n{'damage':32} {'found':8} {'without manifest':16} WebDataset alone", *lines, sep="\n")
    print(f"detected {len(DAMAGES) * len(READERS) - len(undetected)}/{len(DAMAGES) * len(READERS)}")
    assert not undetected
    assert not unnamed
    assert set(DAMAGES) - bare == {"two swapped members", "missing member", "longer than it was"}, (
        "only a manifest can tell"
    )


def test_another_whole_shard_in_the_place_of_one_is_found(tmp_path: Path) -> None:
    """A shard of the right name and form, from another data set."""
    write_set(tmp_path / "set")
    write_set(tmp_path / "other", 40)
    (tmp_path / "other" / SHARD).replace(tmp_path / "set" / SHARD)
    for read in READERS.values():
        with pytest.raises(DataError, match=rf"{SHARD} must (have|hold) "):
            read(tmp_path / "set")


@pytest.mark.parametrize("name", ["payload bit flip", "bit flip in a block's table", "512 zero bytes in a payload"])
def test_damage_inside_a_block_is_named_by_block_when_only_sizes_are_verified(tmp_path: Path, name: str) -> None:
    write_set(tmp_path / "set")
    path = tmp_path / "set" / SHARD
    path.write_bytes(DAMAGES[name](path.read_bytes(), *find_places(path)))
    number = 2 if "zero" in name else 3
    with shards.open_dataset(tmp_path / "set") as dataset:
        for block in set(range(NUM_BLOCKS)) - {number}:
            assert len(dataset.read_block(block)) == BLOCK_SIZE, "the others can be read"
        with pytest.raises(
            DataError, match=rf"{SHARD}:train-000000-00000{number} must have the CRC \w{{8}}; got \w{{8}}\."
        ):
            dataset.read_block(number)
    with pytest.raises(DataError, match=rf"{SHARD}:train-000000-00000{number} must"):
        read_in_sequence(tmp_path / "set")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cut at a member boundary", r"at byte \d+ must go on with a header or zeros; got the end of the file after 0 bytes"),
        ("cut inside a header", r"at byte \d+ must go on with a header or zeros; got the end of the file after 200 bytes"),
        ("flipped header byte", r"at byte \d+ must be the header of a tar member; got b'tra"),
        ("zeroed check sum", r"at byte \d+ must be the header of a tar member"),
        ("512 zero bytes in the middle", r"at byte \d+ must end with zeros; got \d+ bytes, not all of them zero"),
        ("cut inside a payload", r"member 'train-000000-000003.safetensors' must have \d+ bytes; got the end of the file at"),
        ("duplicate member", r"tar:train-000000-000001 must be there once; got a second one"),
        ("dotted keys", r"member 'train.0.safetensors' must be called by letters, digits, _ and -, and then .safetensors; got"),
        ("path in a name", r"member '../train-000000-000000.safetensors' must be called by"),
        ("a link instead of a member", r"member 'train-000000-000000.safetensors' must be a plain file; got type b'2'"),
        ("member over the limit", r"member 'train-000000-000002.safetensors' must have at most 1073741824 bytes; got 2147483648"),
        ("end cut off", r"at byte \d+ must end with zeros; got 512 bytes, too few"),
        ("payload bit flip", r"000003 must have the check sum \w{8}; got \w{8}\."),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_frame_is_said(tmp_path: Path, name: str, message: str) -> None:
    write_set(tmp_path / "set")
    path = tmp_path / "set" / SHARD
    path.write_bytes(DAMAGES[name](path.read_bytes(), *find_places(path)))
    with pytest.raises(DataError, match=message):
        read_without_manifest(tmp_path / "set")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: [m[0], m[2], m[1], *m[3:]], "tar:train-000000-000002 must come where train-000000-000001 is; got it"),
        (lambda m: m[:4], r"train-000000\.tar must hold 5 blocks; got 4"),
        (lambda m: [*m[:4], (m[4][0], m[4][1]), ("train-000000-000005.safetensors", m[4][1])], r"must hold 5 blocks; got 6"),
        (lambda m: [(m[0][0], m[1][1]), *m[1:]], r"tar must hold 5 blocks, 50 conformers, \d+ atoms; got 5, 50, \d+"),
    ],
)  # fmt: skip
def test_blocks_are_compared_with_the_manifest_also_where_the_length_is_right(
    tmp_path: Path, change, message: str
) -> None:
    manifest = write_set(tmp_path / "set")
    path = tmp_path / "set" / SHARD
    path.write_bytes(rebuild(path.read_bytes(), change))
    entry = manifest.shards[0]
    sized = shards.ShardEntry(**{f: getattr(entry, f) for f in entry.__slots__} | {"size": path.stat().st_size})
    with pytest.raises(DataError, match=message):
        list(shards.iter_shard(path, sized))
