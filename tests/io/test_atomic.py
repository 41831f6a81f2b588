"""Atomic writes: complete, or not there at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from fusion_bench_smile import CheckpointError
from fusion_bench_smile.io import (
    check_writable_folder,
    replace_file_atomically,
    replace_folder_atomically,
    write_atomically,
)


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def fail_in(writing: AbstractContextManager[Path], name: str, error: type[BaseException]) -> None:
    """Raise an error inside of the block, after something was written."""
    with writing as scratch:
        (scratch / name).write_text("half")
        raise error


# -- files


def test_text_and_bytes_are_written_and_replaced(tmp_path):
    write_atomically(tmp_path / "a.txt", "ΔW = B A")
    write_atomically(tmp_path / "b", b"\x00\xff")
    assert (tmp_path / "a.txt").read_bytes() == "ΔW = B A".encode()
    assert (tmp_path / "b").read_bytes() == b"\x00\xff"
    write_atomically(tmp_path / "a.txt", "other")
    assert (tmp_path / "a.txt").read_text() == "other"
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "b"]


def test_a_file_is_not_there_before_it_is_complete(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("old")
    with replace_file_atomically(file) as scratch:
        assert scratch.parent == tmp_path
        assert scratch.name.startswith(".a.txt.")
        assert scratch.name.endswith(".part")
        scratch.write_text("half")
        assert file.read_text() == "old"
        scratch.write_text("whole")
    assert contents(tmp_path) == {"a.txt": "whole"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_keeps_the_old_file_and_leaves_nothing_else(tmp_path, error):
    file = tmp_path / "a.txt"
    for _ in range(2):  # without an old file, and with one
        before = contents(tmp_path)
        with pytest.raises(error):
            fail_in(replace_file_atomically(file), "", error)
        assert contents(tmp_path) == before
        file.write_text("old")


def test_a_file_has_the_mode_of_a_file_that_is_opened(tmp_path, umask):
    write_atomically(tmp_path / "a.txt", "")
    (tmp_path / "plain").write_text("")
    assert mode(tmp_path / "a.txt") == mode(tmp_path / "plain") == 0o666 & ~umask
    assert os.umask(umask) == umask  # the mask of the process is unchanged


def test_a_file_that_cannot_be_written_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        write_atomically(tmp_path / "nowhere" / "a.txt", "")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_atomically(tmp_path / "folder", "")
    assert os.listdir(tmp_path) == ["folder"]


# -- folders


def test_a_folder_is_created_with_its_parents(tmp_path):
    with replace_folder_atomically(tmp_path / "a" / "b" / "c") as scratch:
        assert scratch.parent == tmp_path / "a" / "b"
        assert scratch.name.startswith(".c.")
        assert scratch.name.endswith(".part")
        (scratch / "file").write_text("new")
        assert not (tmp_path / "a" / "b" / "c").exists()
    assert contents(tmp_path) == {"a/b/c/file": "new"}
    assert os.listdir(tmp_path / "a" / "b") == ["c"]


def test_a_folder_is_replaced_and_the_chosen_entries_are_carried_along(tmp_path):
    folder = tmp_path / "model"
    (folder / "kept").mkdir(parents=True)
    for name in ("README.md", "weights.bin", "config.json", "kept/inner"):
        (folder / name).write_text("old")
    with replace_folder_atomically(folder, carry=lambda name: not name.endswith(".bin")) as scratch:
        (scratch / "config.json").write_text("new")
    assert contents(folder) == {"README.md": "old", "config.json": "new", "kept/inner": "old"}
    assert os.listdir(tmp_path) == ["model"]
    with replace_folder_atomically(folder):
        pass
    assert contents(folder) == {}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_keeps_the_old_folder_and_leaves_nothing_else(tmp_path, error):
    folder = tmp_path / "model"
    for _ in range(2):  # without an old folder, and with one
        before = contents(tmp_path)
        with pytest.raises(error):
            fail_in(replace_folder_atomically(folder, carry=lambda _: True), "file", error)
        assert contents(tmp_path) == before
        assert os.listdir(tmp_path) == (["model"] if before else [])
        folder.mkdir(exist_ok=True)
        (folder / "file").write_text("old")


def test_a_failing_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "file").write_text("old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            raise OSError("no space left")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no space left"), replace_folder_atomically(folder) as scratch:
        (scratch / "file").write_text("new")
    monkeypatch.undo()
    assert contents(tmp_path) == {"model/file": "old"}
    assert os.listdir(tmp_path) == ["model"]


def test_a_folder_has_the_mode_of_a_folder_that_is_made(tmp_path, umask):
    with replace_folder_atomically(tmp_path / "model"):
        pass
    (tmp_path / "plain").mkdir()
    assert mode(tmp_path / "model") == mode(tmp_path / "plain") == 0o777 & ~umask


def test_a_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with replace_folder_atomically(Path("model")) as scratch:
        (scratch / "file").write_text("new")
    assert contents(tmp_path) == {"model/file": "new"}


def test_folders_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file; a checkpoint needs a folder"):
        check_writable_folder(tmp_path / "file")
    for folder in (tmp_path / "file" / "model", Path("/proc/smile/model")):
        with pytest.raises(CheckpointError, match="nothing can be written to"):
            check_writable_folder(folder)
        with pytest.raises(CheckpointError, match="nothing can be written to"), replace_folder_atomically(folder):
            raise AssertionError("the block must not run")
    check_writable_folder(tmp_path / "new" / "model")
    assert not (tmp_path / "new" / "model").exists()
