"""Files and folders: who may read them, and what is no folder."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from so3krates_dist.errors import DataError
from so3krates_dist.files import _read_mask, make_folder, put_in_place, write_text


def test_a_file_has_the_mode_of_other_files(tmp_path: Path) -> None:
    """Whatever the library that wrote it gave it."""
    before = os.umask(0o027)
    try:
        save_file({"weights": torch.zeros(1)}, tmp_path / "temporary")
        put_in_place(tmp_path / "temporary", tmp_path / "weights")
        assert os.umask(0o027) == 0o027, "the mask is left"
    finally:
        os.umask(before)
    assert (tmp_path / "weights").stat().st_mode & 0o777 == 0o640


def test_the_mask_where_there_is_no_file_about_it(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _read_mask()
    monkeypatch.setattr(Path, "read_text", fail)
    assert _read_mask() == expected


def test_text_that_finds_no_room_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a.txt", "before")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "a.txt", "after")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "before")]


def test_text_does_not_go_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".a.txt.tmp").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        write_text(tmp_path / "a.txt", "evil")
    assert (tmp_path / "mine").read_text() == "mine"


def fail(*_: object, **__: object) -> None:
    """Be a disk without room."""
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(("name", "got"), [("file", "a file"), ("file/below", "Not a directory")])
def test_what_cannot_be_a_folder(tmp_path: Path, name: str, got: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=f"{name} must be a folder that can be written to; got {got}. Give another"):
        make_folder(tmp_path / name)


def test_a_folder_that_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # nothing is read-only for root
    with pytest.raises(DataError, match="got one that is read-only"):
        make_folder(tmp_path)


def test_a_folder_is_made(tmp_path: Path) -> None:
    for _ in range(2):
        make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_text_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "first")
    write_text(tmp_path / "a.txt", "Ångström")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "Ångström"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
