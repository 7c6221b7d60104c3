"""Settings of remote files, a file, and how to fetch it: what the tests of storage start from."""

import hashlib
import random
from pathlib import Path

from so3krates_dist.data.storage import Storage, StorageSettings

SHARD = random.Random(0).randbytes(200_000)
SECRET = "hunter2hunter2"


def make_settings(tmp_path: Path, **changes: object) -> StorageSettings:
    values = {"cache": tmp_path / "cache", "connect_timeout_s": 10.0, "stall_timeout_s": 10.0, "retries": 2} | changes
    return StorageSettings(**values)  # type: ignore[arg-type] - of one test each


def fetch(place: Storage, name: str = "a.tar", content: bytes = SHARD) -> Path:
    return place.fetch(name, size=len(content), sha256=hashlib.sha256(content).hexdigest())


def list_cache(tmp_path: Path) -> set[str]:
    return {p.name for p in (tmp_path / "cache" / "shards").glob("*/*") if p.parent.name != "locks"}
