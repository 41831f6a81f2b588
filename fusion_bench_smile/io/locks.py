"""Locks between processes and threads that write into one folder."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PATIENCE = 10.0  # seconds; what is locked takes milliseconds
PAUSE = 0.01  # seconds between two attempts


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file or folder until it is closed: False if another process holds the lock, None without locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system has none
        return None
    return True


def wait_for_lock(descriptor: int) -> None:
    """Lock as `try_lock`, after at most `PATIENCE` seconds. Whether it was locked is unknown afterwards."""
    end = time.monotonic() + PATIENCE
    while try_lock(descriptor) is False and time.monotonic() < end:
        time.sleep(PAUSE)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of an existing folder inside the ``with`` block. It leaves no file, and ends with its process.

    The block runs without the lock where the system has none (Windows, some network file systems), and where another
    process does not release it for `PATIENCE` seconds. It must be harmless then.
    """
    handle = None
    with suppress(OSError):  # a folder that may be written but not read
        handle = os.open(folder, os.O_RDONLY)
    try:
        if handle is not None:
            wait_for_lock(handle)
        yield
    finally:
        if handle is not None:
            os.close(handle)
