"""Work that one of the workers of a test run does for all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def run_once(folder: Path, work: Callable[[Path], None]) -> Path:
    """The folder, which the first caller fills; the others wait."""
    complete = folder.with_name(f"{folder.name}.complete")
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not complete.exists():
            folder.mkdir(parents=True, exist_ok=True)  # a command line may have written there
            work(folder)
            complete.touch()
    return folder
