"""Full disks: no file may grow beyond a random size while something is written over an older version."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from studies.reliability.outcomes import RIGHT, Outcome, combined, judge
from studies.reliability.run_reports import leaderboard_target, report_target
from studies.reliability.runner import Case, Part, Trial
from studies.reliability.targets import Target, all_targets, leftovers, sampled

COUNTS = {
    "save, shards": 60, "save, router for whole inputs": 40, "save, not of transformers": 40, "upscale_to_folder": 40,
    "export_adapters": 40, "FactorCache": 40, "RunReport.write": 100, "smile-leaderboard": 20,
}  # fmt: skip
PARTLY_NEW = ("export_adapters", "smile-leaderboard")  # of several files or folders, which are written one by one


class Limited(NamedTuple):
    """A target, and the size in bytes of its largest file."""

    target: Target
    largest: int


def prepare(folder: Path) -> dict[str, Limited]:
    """All targets, each written once."""
    reports = {"RunReport.write": report_target(), "smile-leaderboard": leaderboard_target(folder)}
    targets = sampled({**all_targets(folder), **reports}, folder)
    return {name: Limited(targets[name], _largest_file(targets[name].sample)) for name in COUNTS}


def _largest_file(folder: Path | None) -> int:
    return max(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder else 0


def attempt(prepared: dict[str, Limited], case: Case, name: str) -> Iterator[Outcome]:
    """Write version 1 over version 0: completely, or with a clear error, after which version 0 is there."""
    (target, largest), path = prepared[name], case.folder / "target"
    target.begin(path)
    with file_size_limit(case.random.randrange(int(1.2 * largest))):
        outcome = judge(lambda: target.write(path, 1), lambda _: RIGHT, allowed=(SystemExit,))
    possible = (1,) if outcome == RIGHT else (0, 1) if name in PARTLY_NEW else (0,)
    yield combined([
        outcome, judge(lambda: target.examine(path, possible), lambda found: found), leftovers(case.folder),
        judge(lambda: target.write(path, 2), lambda _: target.examine(path, (2,))),
    ])  # fmt: skip


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Inside of the block, writing beyond a size raises OSError, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


PART = Part("disks", prepare, {name: Trial(partial(attempt, name=name), count) for name, count in COUNTS.items()})
