"""Kills: a process that replaces an older version is killed at a random time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from studies.reliability.children import Child
from studies.reliability.outcomes import Outcome, check, combined, judge
from studies.reliability.runner import Case, Part, Trial
from studies.reliability.targets import COMPANION, Target, all_targets, leftovers, sampled

COUNTS = {
    "save, shards": 120, "save, other numbers of shards": 60, "save, router for whole inputs": 60,
    "save, not of transformers": 60, "upscale_to_folder": 60, "export_adapters": 60, "FactorCache": 60,
}  # fmt: skip
FRESH_SHARE = 0.2  # of attempts without an older version


class Killable(NamedTuple):
    """A target, and the seconds that writing it takes."""

    target: Target
    seconds: float


def prepare(folder: Path) -> dict[str, Killable]:
    """All targets, each written once."""
    targets = sampled(all_targets(folder), folder)
    return {name: Killable(target, _measure(target, folder / "measured" / name)) for name, target in targets.items()}


def _measure(target: Target, path: Path) -> float:
    target.begin(path)
    began = time.perf_counter()
    target.write(path, 1)
    return time.perf_counter() - began


def attempt(prepared: dict[str, Killable], case: Case, name: str) -> Iterator[Outcome]:
    """Kill a process that writes version 1 over version 0 or over nothing, look at what is there, and write again."""
    (target, seconds), path = prepared[name], case.folder / "target"
    fresh = case.random.random() < FRESH_SHARE
    if not fresh:
        target.begin(path)
        if target.carries:
            (path / COMPANION).write_text("by a person")
    child = Child(lambda send: target.write(path, 1))  # type: ignore[arg-type]
    time.sleep(case.random.uniform(0, 1.5 * seconds))
    child.kill()
    child.wait()
    yield combined([
        judge(lambda: target.examine(path, (1,) if fresh else (0, 1), may_be_absent=fresh), lambda outcome: outcome),
        judge(lambda: target.write(path, 2), lambda _: target.examine(path, (2,))),
        leftovers(case.folder),
        check(fresh or not target.carries or (path / COMPANION).exists(), "a file of a person was lost"),
    ])  # fmt: skip


PART = Part("kills", prepare, {name: Trial(partial(attempt, name=name), count) for name, count in COUNTS.items()})
