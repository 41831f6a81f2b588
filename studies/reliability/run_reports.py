"""Reports of runs, and what the leaderboard makes of them, as targets."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from fusion_bench_smile.reports import REPORT_FILE, RunReport
from studies.reliability.targets import NUM_VERSIONS, Target

ENDS = {".html": b"</html>", ".svg": b"</svg>", ".png": b"IEND\xaeB`\x82"}  # of complete files


def report_values(label: str = "SMILE", benchmark: str = "small", **changes: Any) -> dict[str, Any]:
    """The JSON values of a complete report of two tasks."""
    tasks = {name: {"metric": "accuracy", "score": score, "samples": 10} for name, score in (("a", 80.0), ("b", 60.0))}
    return {
        "schema_version": 1, "status": "complete", "label": label, "benchmark": benchmark, "modelpool": "pool",
        "taskpool": "tasks", "method": {"_target_": "some.Method", "gate_k": 4, "k": 8, "top_k": 1}, "tasks": tasks,
        "fingerprint": label, "average": 70.0, "parameters": 150, "pretrained_parameters": 100, "seed": 0,
        "construction": {"seconds": 1.5, "peak_host_bytes": 2_000_000}, "evaluation": {"seconds": 2.0},
        "routing": {"experts": ["a", "b"], "layers": {"fc1": {"load": [0.5, 0.5], "entropy": 0.9}}},
        "unused_change": {"share": 0.1, "largest": {"norm": 0.05}}, "overrides": ["method.k=8"], "models": ["a", "b"],
        "environment": {
            "python": "3", "platform": "p", "accelerator": "cpu", "processes": 1, "threads": 1,
            "packages": {"torch": "2"},
        },
        "started": "2026-01-01T00:00:00Z", "finished": "2026-01-01T00:01:00Z", **changes,
    }  # fmt: skip


def leaderboard_command() -> Callable[[list[str]], None]:
    """The command ``smile-leaderboard``, called with its arguments. It ends with SystemExit for an error."""
    (command,) = entry_points(group="console_scripts", name="smile-leaderboard")
    main: Callable[[list[str]], None] = command.load()
    return main


def report_target() -> Target:
    """A run's report."""
    reports = [RunReport.model_validate(report_values(average=70.0 + version)) for version in range(NUM_VERSIONS)]

    def read(path: Path) -> dict[str, str]:
        file = path / REPORT_FILE
        return {"report": RunReport.read(file).model_dump_json()} if file.exists() else {}

    versions = [{"report": report.model_dump_json()} for report in reports]
    return Target(lambda path, version: reports[version].write(path), read, versions)


def leaderboard_target(folder: Path) -> Target:
    """What ``smile-leaderboard --output`` writes for some runs."""
    command, labels = leaderboard_command(), [f"SMILE {version}" for version in range(NUM_VERSIONS)]

    def write(path: Path, version: int) -> None:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            command([str(folder / "runs" / labels[version]), "--output", str(path), "--format", "csv"])

    def read(path: Path) -> dict[str, str]:
        return {file.name: _described(file, labels) for file in path.iterdir()} if path.is_dir() else {}

    for label in labels:
        RunReport.model_validate(report_values(label)).write(folder / "runs" / label)
    sample = folder / "leaderboard"
    write(sample, 0)
    parts = read(sample)
    versions = [{name: part.replace(labels[0], label) for name, part in parts.items()} for label in labels]
    return Target(write, read, versions, sample=sample)


def _described(file: Path, labels: Sequence[str]) -> str:
    """The run that a text names, or that an image is complete. Both contain times and random names."""
    content, end = file.read_bytes(), ENDS.get(file.suffix)
    if end is not None and not content.rstrip().endswith(end):
        return "damaged"
    named = [label for label in labels if label.encode() in content]
    return f"complete, {len(content) if end is None else 'image'}, {named}"
