"""Atomic writes: a file or folder is complete, or it is not there."""

import ctypes
import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..exceptions import CheckpointError
from .locks import try_lock, wait_for_lock
from .text import shortened

SUFFIX, OLD_SUFFIX = ".part", ".old"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux, see renameat2(2)
_umask_lock = threading.Lock()
OCCUPIED = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


@contextmanager
def replace_file_atomically(file: Path) -> Iterator[Path]:
    """Yield a temporary path beside `file`, and rename it to `file` if the block succeeds.

    Temporary files for `file` whose process has ended are deleted. Raises OSError if nothing can be written there.
    """
    remove_leftovers(file.parent, file.name)
    scratch, lock = _locked(lambda: _make_file(file))
    try:
        yield scratch
        scratch.chmod(0o666 & ~_umask())  # mkstemp makes a file for its owner alone
        os.replace(scratch, file)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    finally:
        os.close(lock)


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write a file, complete or not at all; text in UTF-8. Raises as `replace_file_atomically`."""
    with replace_file_atomically(file) as scratch:
        scratch.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def replace_folder_atomically(folder: Path, carry: Callable[[str], bool] = lambda name: False) -> Iterator[Path]:
    """Yield a new folder beside `folder`, and put it in the place of `folder` if the block succeeds.

    The old folder need not exist. Entries of it whose name `carry` accepts are copied into the new one if that has none
    of the name. On Linux both are exchanged in one step, so that there is a complete folder at any time. Temporary
    folders for `folder` whose process has ended are deleted.

    Raises CheckpointError if nothing can be written there, or the disk is full.
    """
    folder = Path(os.path.realpath(folder))  # the folder that a symbolic link names is replaced, not the link
    check_writable_folder(folder)
    remove_leftovers(folder.parent, folder.name)
    try:
        with _temporary_folder(folder) as scratch:
            yield scratch
            _carry_entries(folder, scratch, carry)
            scratch.chmod(0o777 & ~_umask())
            put_in_place(scratch, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} can't be written: {_reason(error)}; choose another path, or free space"
        ) from error


@contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    """A locked folder beside `folder`. Whatever has its name at the end is deleted: it, or the folder it replaced."""
    prefix = f".{folder.name}."
    scratch, lock = _locked(lambda: Path(tempfile.mkdtemp(prefix=prefix, suffix=SUFFIX, dir=folder.parent)))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(lock)


def check_writable_folder(folder: Path) -> None:
    """Raise a CheckpointError for a folder that cannot be written, before any work is done for it."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; a checkpoint needs a folder: choose another path")
    parent = folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        probe = tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=SUFFIX, dir=parent)
        with suppress(FileNotFoundError):  # another process took it for a leftover
            os.rmdir(probe)
    except (OSError, ValueError) as error:  # ValueError for a path with a null byte
        problem = f"nothing can be written to {shortened(str(parent), 300)}: {_reason(error)}; choose another path"
        raise CheckpointError(problem) from None


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Delete temporary files and folders for `name` in a folder whose process has ended.

    The process that writes one holds a lock on it, which ends with the process. Where the file system has no locks,
    nothing is deleted. Other errors are ignored as well: the leftovers do no harm.
    """
    prefix = "." if name == "*" else f".{name}."
    suffixes = (SUFFIX, OLD_SUFFIX) if (folder / name).exists() else (SUFFIX,)  # the last copy is never deleted
    with suppress(OSError):
        for found in [entry for entry in os.listdir(folder) if entry.startswith(prefix) and entry.endswith(suffixes)]:
            _remove_if_unlocked(folder / found)


def _remove_if_unlocked(path: Path) -> None:
    with suppress(OSError):
        lock = os.open(path, os.O_RDONLY)
        try:
            if try_lock(lock):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        finally:
            os.close(lock)


def _locked(make: Callable[[], Path]) -> tuple[Path, int]:
    """A new temporary file or folder, and the descriptor that holds a lock on it until it is closed."""
    while True:
        scratch = make()
        try:
            lock = os.open(scratch, os.O_RDONLY)
        except FileNotFoundError:  # another process took it for a leftover before it was locked
            continue
        wait_for_lock(lock)
        if scratch.exists():
            return scratch, lock
        os.close(lock)


def _make_file(file: Path) -> Path:
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", suffix=SUFFIX, dir=file.parent)
    os.close(handle)
    return Path(name)


def _carry_entries(folder: Path, scratch: Path, carry: Callable[[str], bool]) -> None:
    """Copy entries of the old folder, which other processes may replace meanwhile, into the new one."""
    for name in os.listdir(folder) if folder.is_dir() else ():
        if carry(name) and not (scratch / name).exists():
            source = folder / name
            copy: Any = shutil.copytree if source.is_dir() else shutil.copy2
            with suppress(FileNotFoundError, shutil.Error):
                copy(source, scratch / name)


def put_in_place(scratch: Path, folder: Path, exchange: Callable[[Path, Path], bool] | None = None) -> None:
    """Rename `scratch` to `folder`. A folder that is there gets the name `scratch`, or is deleted.

    Without a working `exchange`, by default that of Linux, there is no folder for an instant.
    """
    exchange = exchange or _exchange
    while True:
        try:
            scratch.rename(folder)  # over an empty folder, too
            return
        except OSError as error:
            if error.errno not in OCCUPIED:
                raise
        if exchange(scratch, folder):
            return
        with suppress(FileNotFoundError):  # another process has moved it
            _replace_in_two_steps(scratch, folder)
            return


def _replace_in_two_steps(scratch: Path, folder: Path) -> None:
    old = scratch.with_suffix(OLD_SUFFIX)
    folder.rename(old)
    try:
        scratch.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two paths in one step; False where the system or the file system cannot, or one of them is missing."""
    rename = _renameat2()
    if rename is None:
        return False
    return rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0


@cache
def _renameat2() -> Callable[..., int] | None:
    try:
        return ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # another system, or a C library before glibc 2.28
        return None


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or shortened(error)


def _umask() -> int:
    with _umask_lock:  # it can only be read by setting it
        mask = os.umask(0)
        os.umask(mask)
    return mask
