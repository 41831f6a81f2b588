"""Folders that are derived from packaged files once and kept in the user's cache."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from fusion_bench_smile.exceptions import SmileError


def cache_folder() -> Path:
    """The folder of all derived files: ``fusion_bench_smile_zoo`` in ``$XDG_CACHE_HOME``, by default ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fusion_bench_smile_zoo"


def cached_folder(name: str, build: Callable[[Path], object]) -> Path:
    """A folder in the cache; the first call builds it.

    The folder gets its name when it is complete. Of several processes that build it at once, the first one to finish
    puts its folder in place, and all others use that one: its files never change.

    Args:
        name: of the folder, with a key of the content in it.
        build: writes the content into an empty folder.

    Raises:
        SmileError: if the cache can't be written.
    """
    folder = cache_folder() / name
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder.parent) as scratch:
            complete = Path(scratch) / name
            complete.mkdir()
            build(complete)
            _rename(complete, folder)
    except OSError as error:
        raise SmileError(f"{folder} can't be written: {error}; set XDG_CACHE_HOME to another folder") from error
    return folder


def _rename(complete: Path, folder: Path) -> None:
    try:
        complete.rename(folder)
    except OSError:
        if not folder.exists():  # otherwise another process was first
            raise
