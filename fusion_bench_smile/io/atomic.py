"""Atomic writes: a file or folder is complete, or it is not there."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..exceptions import CheckpointError


@contextmanager
def replace_file_atomically(file: Path) -> Iterator[Path]:
    """Yield a temporary path beside `file`, and rename it to `file` if the block succeeds.

    Raises OSError if nothing can be written there.
    """
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".part", dir=file.parent)
    os.close(handle)
    scratch = Path(name)
    try:
        yield scratch
        scratch.chmod(0o666 & ~_umask())  # mkstemp makes a file for its owner alone
        os.replace(scratch, file)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write a file, complete or not at all; text in UTF-8. Raises as `replace_file_atomically`."""
    with replace_file_atomically(file) as scratch:
        scratch.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def replace_folder_atomically(folder: Path, carry: Callable[[str], bool] = lambda name: False) -> Iterator[Path]:
    """Yield a new folder beside `folder`, and put it in the place of `folder` if the block succeeds.

    The old folder need not exist. Entries of it whose name `carry` accepts are copied into the new one if that has none
    of the name. Raises CheckpointError if nothing can be written there.
    """
    folder = Path(os.path.abspath(folder))
    check_writable_folder(folder)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    old = scratch.with_suffix(".old")
    try:
        yield scratch
        for entry in folder.iterdir() if folder.exists() else ():
            if carry(entry.name) and not (scratch / entry.name).exists():
                copy = shutil.copytree if entry.is_dir() else shutil.copy2
                copy(entry, scratch / entry.name)
        scratch.chmod(0o777 & ~_umask())
        if folder.exists():
            folder.rename(old)
        scratch.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def check_writable_folder(folder: Path) -> None:
    """Raise a CheckpointError for a folder that cannot be written, before any work is done for it."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; a checkpoint needs a folder: choose another path")
    parent = folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=parent).cleanup()
    except OSError as error:
        raise CheckpointError(f"nothing can be written to {parent}: {error.strerror}; choose another path") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
