"""Where data came from: names and hashes of files, versions of programs. No dates, no hosts, no folders."""

import hashlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from so3krates_dist import __version__, files

WHOLE_HASH_BYTES: Final = 2**30
"""Larger files are known by their length and samples of their bytes: each part of a conversion would read all of them"""
_SAMPLES: Final = 64
_SAMPLE_BYTES: Final = 2**20


def describe_versions(*packages: str) -> dict[str, str]:
    """Return the version of this package and of others that have a say in the numbers."""
    return {"so3krates-dist": __version__} | {name: metadata.version(name) for name in packages}


def describe_source(path: Path) -> dict[str, Any]:
    """Return name and sha256 of a file that data came from; of a very large one, length and sha256 of samples of its bytes.

    Folders above it are nobody's business.
    """
    size = path.stat().st_size
    if size <= WHOLE_HASH_BYTES:
        return {"file": path.name, "sha256": files.hash_file(path)}
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for number in range(_SAMPLES):
            file.seek(number * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return {"file": path.name, "size": size, "sha256_of_samples": digest.hexdigest()}


def identify_source(path: Path, described: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tells whether a file is still the same: with its time of change where not all bytes were looked at."""
    return dict(described) if "sha256" in described else dict(described) | {"mtime_ns": path.stat().st_mtime_ns}
