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
        if handle is not None and fcntl is not None:
            _wait_for_lock(handle)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _wait_for_lock(handle: int) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:  # the file system has no locks
            return
        else:
            return
