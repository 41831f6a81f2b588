"""Concurrency: several processes write into one folder at the same time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from fusion_bench_smile.reports import RunReport
from studies.reliability.children import Child, Send
from studies.reliability.outcomes import RIGHT, Outcome, check, combined, judge, other
from studies.reliability.run_reports import report_target, report_values
from studies.reliability.runner import Case, Part, Trial
from studies.reliability.targets import NUM_VERSIONS, Target, all_targets, leftovers, sampled

COUNTS = {
    "save, shards": 40, "save, other numbers of shards": 20, "save, router for whole inputs": 20,
    "save, not of transformers": 40, "upscale_to_folder": 20, "export_adapters": 40, "FactorCache": 40,
    "RunReport.write": 60,
}  # fmt: skip
OTHER_RUNS = "RunReport.write, other configurations"
REPEATS = 2  # of each process
START = 0.05  # seconds until all processes begin


def prepare(folder: Path) -> dict[str, Target]:
    """All targets."""
    return sampled({**all_targets(folder), "RunReport.write": report_target()}, folder)


def attempt(prepared: dict[str, Target], case: Case, name: str) -> Iterator[Outcome]:
    """Each process writes its version into one folder, new or not: no error, and one of the versions is there."""
    target, path = prepared[name], case.folder / "deep" / "target"
    if case.random.random() < 0.5:
        target.begin(path)
    versions = range(NUM_VERSIONS)
    outcomes = _together([partial(target.write, path, version) for version in versions], REPEATS)
    yield combined(
        [*outcomes, judge(lambda: target.examine(path, versions), lambda found: found), leftovers(case.folder)]
    )


def other_runs(prepared: dict[str, Target], case: Case) -> Iterator[Outcome]:
    """Runs of several configurations write into one folder: no report is lost."""
    labels = [f"run {number}" for number in range(NUM_VERSIONS)]
    reports = [RunReport.model_validate(report_values(label)) for label in labels]
    outcomes = _together([partial(report.write, case.folder / "runs") for report in reports], REPEATS)
    files = [path for path in (case.folder / "runs").iterdir() if path.suffix == ".json"]
    found = judge(
        lambda: {RunReport.read(file).label for file in files},
        lambda found: check(found == set(labels), f"of the reports, {sorted(found)} are left"),
    )
    yield combined([*outcomes, found, leftovers(case.folder)])


def _together(actions: list[Callable[[], object]], repeats: int) -> list[Outcome]:
    """The outcomes of actions in as many processes, which begin at the same time. A clear error is no success here."""
    begin = time.monotonic() + START

    def work(action: Callable[[], object], send: Send) -> None:
        time.sleep(max(0, begin - time.monotonic()))
        for _ in range(repeats):
            send(judge(action, lambda _: RIGHT))

    children = [Child(partial(work, action)) for action in actions]
    outcomes = [Outcome(*value) for child in children for value in child.values()]
    for child in children:
        child.wait()
    failed = [outcome for outcome in outcomes if outcome != RIGHT]
    if failed or len(outcomes) != len(actions) * repeats:
        return [other(f"a writer failed: {failed[0].detail}" if failed else "a writer was lost")]
    return outcomes


PART = Part("concurrency", prepare, {
    **{name: Trial(partial(attempt, name=name), count) for name, count in COUNTS.items()},
    OTHER_RUNS: Trial(other_runs, 60),
})  # fmt: skip
