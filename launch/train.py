"""Entry for launchers that take a file: `deepspeed --num_accelerators 2 launch/train.py run=quickstart`.

The same as `so3krates train`, but for `--local_rank`, which launchers put first and which is ignored: each process reads its
place from its environment (LOCAL_RANK). The installed package is what runs: this folder holds nothing that could shadow it.
"""

import re
import sys
from collections.abc import Sequence

from so3krates_dist.cli import main

LOCAL_RANK = re.compile(r"--local[_-]rank(=\d+)?")


def drop_local_rank(words: Sequence[str]) -> list[str]:
    """Return the words without `--local_rank=N`, `--local_rank N` and their spellings with a hyphen."""
    kept: list[str] = []
    skip_value = False
    for word in words:
        if skip_value and word.isdecimal():
            skip_value = False
            continue
        match = LOCAL_RANK.fullmatch(word)
        skip_value = match is not None and match[1] is None
        if match is None:
            kept.append(word)
    return kept


if __name__ == "__main__":
    sys.exit(main(["train", *drop_local_rank(sys.argv[1:])]))
