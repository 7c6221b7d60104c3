"""What the tests of remote data share: a server on this machine, and waits that are over at once."""

from collections.abc import Iterator

import loopback
import pytest
from loopback import Loopback
from storage_setup import SHARD

from so3krates_dist.data import storage


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.01)


@pytest.fixture
def server() -> Iterator[Loopback]:
    with loopback.serve() as state:
        state.files["/set/a.tar"] = SHARD
        state.files["/set/manifest.json"] = b'{"name": "x"}'
        yield state
