"""Reports of runs for tests of reports, leaderboards and the program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusion_bench_smile.reports import RunReport

CLIP_TASKS = ("sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")


def accuracies(**scores: float) -> dict[str, dict[str, Any]]:
    """The tasks of a report, with scores in percent."""
    return {name: {"metric": "accuracy", "score": score} for name, score in scores.items()}


def report(**changes: Any) -> RunReport:
    """A complete report of two tasks."""
    tasks = {name: {"metric": "accuracy", "score": score, "samples": 10} for name, score in (("a", 80.0), ("b", 60.0))}
    values = {
        "status": "complete", "label": "SMILE (gate_k=4, k=8)", "benchmark": "small", "modelpool": "pool",
        "taskpool": "tasks", "method": {"_target_": "some.Method", "gate_k": 4, "k": 8}, "fingerprint": "abc",
        "tasks": tasks, "average": 70.0, "parameters": 150, "pretrained_parameters": 100,
        "construction": {"seconds": 1.5, "peak_host_bytes": 2_000_000}, "evaluation": {"seconds": 2.0},
        "environment": {
            "python": "3", "platform": "p", "accelerator": "cpu", "processes": 1, "threads": 1, "packages": {}
        },
        "started": "2026-01-01T00:00:00Z", "finished": "2026-01-01T00:01:00Z",
    }  # fmt: skip
    return RunReport.model_validate(values | changes)


def write_run(root: Path, name: str, a: float, b: float, parameters: int = 100, **changes: Any) -> Path:
    """Write the report of a run with scores `a` and `b` into the folder `name`."""
    changes = {
        "label": name, "fingerprint": name, "tasks": accuracies(a=a, b=b), "parameters": parameters,
    } | changes  # fmt: skip
    return report(**changes).write(root / name)
