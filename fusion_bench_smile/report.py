"""The report of one run: what was measured, of what, and where. The same for every method; read by the leaderboard."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import SmileError

FILE = "smile_report.json"
SCHEMA_VERSION = 1
PERCENT = {"accuracy": 100.0, "spearman_rho": 100.0}  # reported as parts of one
NOT_TASKS = ("average", "model_info", "run")


class ReportError(SmileError):
    """A file that isn't a report this version can read."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TaskResult(_Part):
    """One task.

    Attributes:
        metric: what `score` is, e.g. ``accuracy``.
        score: in percent for accuracy, 100 ρ for ``spearman_rho``, else as the task pool gave it; None if undefined.
        samples: how many were evaluated, if the task pool tells.
        metrics: all numbers of the task pool, as it gave them.
    """

    metric: str
    score: float | None
    samples: int | None = None
    metrics: dict[str, float | None] = Field(default_factory=dict)


class Stage(_Part):
    """Construction or evaluation.

    Attributes:
        seconds: wall-clock time of the first process.
        peak_host_bytes: the most memory of the first process, beyond what it held when the stage began; None where the
            system can't tell.
        peak_device_bytes: the same of its accelerator.
    """

    seconds: float
    peak_host_bytes: int | None = None
    peak_device_bytes: int | None = None

    @property
    def peak_megabytes(self) -> float | None:
        """Of the accelerator, if there is one."""
        peak = self.peak_device_bytes or self.peak_host_bytes
        return None if peak is None else peak / 1e6


class LayerRouting(_Part):
    """One router: each expert's share of the tokens' weights, and the mean entropy of the softmax over all experts.

    Attributes:
        entropy: relative to that of an even choice: 0 is certain, 1 undecided.
    """

    load: list[float]
    entropy: float


class Routing(_Part):
    """What the routers did while the first process evaluated its samples."""

    experts: list[str]
    layers: dict[str, LayerRouting]


class Environment(_Part):
    """Where a run ran; `packages` are all that are installed."""

    python: str
    platform: str
    accelerator: str
    processes: int
    threads: int
    packages: dict[str, str]
    git_revision: str | None = None


class RunReport(_Part):
    """A run, complete or failed.

    Attributes:
        label: the run's name in tables.
        benchmark: runs with the same benchmark can be compared.
        kind: ``individual`` for the fine-tuned models, each on its own task; ``merged`` for all else.
        fingerprint: a hash of what decides the results: method, model pool, task pool, seed.
        config: the resolved configuration.
        average: of the tasks' scores; None where one is undefined.
        retention: the average in percent of the individual models', where they were known to the run.
        parameters: of the model that was evaluated; for individual models, of all of them together.
        bytes: what these take, in the dtypes they are stored in.
        samples_per_second: while evaluating, of all processes together, loading the data included.
        objective: what an optimiser of the run's options maximises.
    """

    schema_version: Literal[1] = 1
    status: Literal["complete", "failed"]
    error: str | None = None
    label: str
    benchmark: str
    kind: Literal["merged", "individual"] = "merged"
    method: dict[str, Any]
    models: list[str] = Field(default_factory=list)
    modelpool: str
    taskpool: str
    seed: int | None = None
    overrides: list[str] = Field(default_factory=list)
    config: dict[str, Any] = Field(default_factory=dict)
    fingerprint: str
    tasks: dict[str, TaskResult] = Field(default_factory=dict)
    average: float | None = None
    retention: float | None = None
    objective: float | None = None
    parameters: int | None = None
    pretrained_parameters: int | None = None
    bytes: int | None = None
    pretrained_bytes: int | None = None
    construction: Stage | None = None
    evaluation: Stage | None = None
    samples_per_second: float | None = None
    routing: Routing | None = None
    environment: Environment
    started: datetime
    finished: datetime

    @model_validator(mode="after")
    def _whole(self) -> RunReport:
        if self.status == "failed" and not self.error:
            raise ValueError("a failed run has an error")
        return self

    @property
    def byte_ratio(self) -> float | None:
        """Bytes of the parameters relative to the pretrained model's."""
        return None if not self.bytes or not self.pretrained_bytes else self.bytes / self.pretrained_bytes

    @property
    def ratio(self) -> float | None:
        """Parameters relative to the pretrained model."""
        if not self.parameters or not self.pretrained_parameters:
            return None
        return self.parameters / self.pretrained_parameters

    def write(self, folder: Path) -> Path:
        """Write the report into a folder, whole or not at all.

        A report of another configuration that lies there is kept, under a name with its fingerprint.
        """
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / FILE
        old = fingerprint_in(file)
        if old not in (None, self.fingerprint):
            os.replace(file, folder / f"{FILE.removesuffix('.json')}-{old}.json")
        write_whole(file, self.model_dump_json(indent=1))
        return file

    @classmethod
    def read(cls, file: Path) -> RunReport:
        """Read a report.

        Raises:
            ReportError: if it is missing, no JSON, of another schema version, or not what the schema says.
        """
        try:
            values = json.loads(file.read_bytes())
        except FileNotFoundError:
            raise ReportError("there is no report: the run was killed, or still goes on") from None
        except (OSError, ValueError) as error:
            raise ReportError(f"it can't be read: {error}") from None
        version = values.get("schema_version") if isinstance(values, dict) else None
        if version != SCHEMA_VERSION:
            raise ReportError(f"its schema version is {version}, this is for {SCHEMA_VERSION}: run it again")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "the report"
            raise ReportError(f"{place}: {first['msg']}") from None


def write_whole(file: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    handle, scratch = tempfile.mkstemp(prefix=f".{file.name}", suffix=".part", dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as output:
            output.write(text)
        os.chmod(scratch, 0o644)  # what mkstemp makes is for its owner alone
        os.replace(scratch, file)
    except BaseException:
        os.unlink(scratch)
        raise


def fingerprint_in(file: Path) -> str | None:
    """The fingerprint of the report at `file`; None where there is none that can be read."""
    try:
        return RunReport.read(file).fingerprint
    except ReportError:
        return None


def fingerprint(values: Mapping[str, Any]) -> str:
    """A hash of a configuration: 12 hexadecimal digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:12]


def task_results(report: Mapping[str, Any]) -> dict[str, TaskResult]:
    """The tasks in a report of a task pool of the framework."""
    results = {}
    for name, value in report.items():
        numbers = _numbers(value if isinstance(value, Mapping) else {"score": value})
        if name in NOT_TASKS or not numbers:
            continue
        metric = next((key for key in PERCENT if key in numbers), next(iter(numbers)))
        score = numbers[metric]
        scaled = None if score is None else score * PERCENT.get(metric, 1.0)
        samples = numbers.pop("samples", None)
        results[name] = TaskResult(
            metric=metric, score=scaled, samples=None if samples is None else int(samples), metrics=numbers
        )
    return results


def average_of(tasks: Mapping[str, TaskResult]) -> float | None:
    """The mean of all scores; None where one is undefined, or there is none."""
    scores = [task.score for task in tasks.values()]
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known and len(known) == len(scores) else None


def retention_of(tasks: Mapping[str, TaskResult], individual: Mapping[str, TaskResult]) -> float | None:
    """The average in percent of the individual models' average on the same tasks; None where that isn't known."""
    if not set(tasks) <= set(individual):
        return None
    own, theirs = average_of(tasks), average_of({name: individual[name] for name in tasks})
    return None if own is None or not theirs else 100 * own / theirs


def _numbers(values: Mapping[str, Any]) -> dict[str, float | None]:
    """The entries that are numbers; those that are undefined (null or NaN) are None."""
    numbers = {key: value for key, value in values.items() if value is None or isinstance(value, (int, float))}
    return {key: None if value is None or value != value else float(value) for key, value in numbers.items()}
