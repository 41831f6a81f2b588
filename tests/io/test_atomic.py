"""Atomic writes: complete, or not there at all."""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from fusion_bench_smile import CheckpointError
from fusion_bench_smile.io import (
    check_writable_folder,
    remove_leftovers,
    replace_file_atomically,
    replace_folder_atomically,
    write_atomically,
)
from fusion_bench_smile.io.atomic import put_in_place


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


def two_folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("model", ".model.x.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    return tmp_path / ".model.x.part", tmp_path / "model"


def test_without_an_exchange_the_old_folder_is_moved_away_first(tmp_path):
    put_in_place(*two_folders(tmp_path), exchange=lambda first, second: False)
    assert contents(tmp_path) == {"model/file": ".model.x.part"}
    assert os.listdir(tmp_path) == ["model"]


def test_a_failing_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    scratch, folder = two_folders(tmp_path)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self == scratch and not folder.exists():
            raise OSError("no space left")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no space left"):
        put_in_place(scratch, folder, exchange=lambda first, second: False)
    monkeypatch.undo()
    assert (folder / "file").read_text() == "model"


def test_a_folder_is_there_at_any_time_while_it_is_replaced(tmp_path):
    folder = tmp_path / "model"
    with replace_folder_atomically(folder) as scratch:
        (scratch / "file").write_text("0")
    stop, seen = threading.Event(), set()

    def read() -> None:
        while not stop.is_set():
            seen.add((folder / "file").read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for version in range(1, 200):
        with replace_folder_atomically(folder) as scratch:
            (scratch / "file").write_text(str(version))
    stop.set()
    reader.join()
    assert len(seen) > 5, "with fewer versions the test shows nothing"
    assert os.listdir(tmp_path) == ["model"]


def test_several_writers_replace_one_folder(tmp_path):
    folder = tmp_path / "model"

    def write(writer: int) -> None:
        for _ in range(50):
            with replace_folder_atomically(folder, carry=lambda name: True) as scratch:
                for name in ("a", "b"):
                    (scratch / name).write_text(str(writer))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert (folder / "a").read_text() == (folder / "b").read_text()
    assert os.listdir(tmp_path) == ["model"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with replace_folder_atomically(tmp_path / "link") as scratch:
        (scratch / "file").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target" / "file").read_text() == "new"


# -- leftovers


def killed_while_writing(tmp_path: Path) -> None:
    """Leave a temporary file and folder, as a process does that is killed."""
    child = os.fork()
    if child == 0:
        with replace_file_atomically(tmp_path / "a.txt"), replace_folder_atomically(tmp_path / "model") as scratch:
            (scratch / "file").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path):
    killed_while_writing(tmp_path)
    assert len(list(tmp_path.glob(".*.part"))) == 2
    write_atomically(tmp_path / "b.txt", "another file")
    assert len(list(tmp_path.glob(".*.part"))) == 2
    write_atomically(tmp_path / "a.txt", "new")
    with replace_folder_atomically(tmp_path / "model") as scratch:
        (scratch / "file").write_text("new")
    assert contents(tmp_path) == {"a.txt": "new", "b.txt": "another file", "model/file": "new"}
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "b.txt", "model"]


def test_temporary_entries_of_living_writers_stay(tmp_path):
    with replace_file_atomically(tmp_path / "a.txt") as file, replace_folder_atomically(tmp_path / "model") as folder:
        remove_leftovers(tmp_path)
        write_atomically(tmp_path / "a.txt", "another writer")
        assert file.exists()
        assert folder.exists()
        (folder / "file").write_text("new")
    assert (tmp_path / "model" / "file").read_text() == "new"


def test_all_leftovers_of_a_folder_can_be_removed(tmp_path):
    killed_while_writing(tmp_path)
    (tmp_path / ".hidden").write_text("no leftover")
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == [".hidden"]
    remove_leftovers(tmp_path / "nowhere")


def fill_disk(folder: Path) -> None:
    with replace_folder_atomically(folder) as scratch, open("/dev/full", "w") as full:
        (scratch / "file").write_text("half")
        full.write("x" * 10**6)


def test_a_full_disk_is_one_clear_error_and_keeps_the_old_folder(tmp_path):
    folder = tmp_path / "model"
    with replace_folder_atomically(folder) as scratch:
        (scratch / "file").write_text("old")
    with pytest.raises(CheckpointError, match="model can't be written: No space left on device"):
        fill_disk(folder)
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
