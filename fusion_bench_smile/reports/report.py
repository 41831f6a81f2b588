"""The report of one run, the same for every method: schema, file, and scores from a task pool's results."""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..exceptions import SmileError
from ..io import write_atomically
from ..io.locks import folder_lock
from ..io.text import printable

REPORT_FILE = "smile_report.json"
SCHEMA_VERSION = 1
LARGEST_FILE = 64 * 2**20  # bytes; a report of a thousand layers has less than one MiB
Count = Annotated[int, Field(ge=0, lt=2**63)]
Difference = Annotated[int, Field(gt=-(2**63), lt=2**63)]
# metrics that task pools and lm-eval give as fractions; the first that a task has is its score
PERCENT_SCALES = dict.fromkeys(
    ("accuracy", "spearman_rho", "exact_match (strict-match)", "exact_match (flexible-extract)", "exact_match",
     "acc_norm", "acc", "f1"), 100.0,
)  # fmt: skip
RESERVED_ENTRIES = ("average", "model_info", "run")  # entries of a task pool's report that are no tasks


class ReportError(SmileError):
    """A report is missing, damaged, of an unsupported schema version, or can't be written."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TaskResult(_Section):
    """The result of one task."""

    metric: str  # of the score, e.g. accuracy
    score: float | None  # % for accuracy, 100 ρ for spearman_rho, else as the task pool gives it; None if undefined
    samples: Count | None = None  # evaluated samples; None if the task pool does not report them
    metrics: dict[str, float | None] = Field(default_factory=dict)  # all numbers of the task pool, unscaled


class Stage(_Section):
    """Resource usage of one stage of a run: construction or evaluation."""

    seconds: float  # wall-clock time of the first process
    peak_host_bytes: Difference | None = None  # peak resident memory beyond that at the start; None if not measurable
    peak_device_bytes: Difference | None = None  # the same for the accelerator; None without one

    @property
    def peak_megabytes(self) -> float | None:
        """Peak memory of the accelerator, or of the host without one, in MB (10⁶ bytes)."""
        peak = self.peak_device_bytes or self.peak_host_bytes
        return None if peak is None else peak / 1e6


class LayerRouting(_Section):
    """Routing statistics of one layer."""

    load: list[float]  # share of the routing weights of all tokens for each of the T experts; the sum is 1
    entropy: float  # mean entropy of the softmax over all experts, relative to a uniform one, from 0 to 1


class Routing(_Section):
    """Routing statistics of the samples that the first process evaluated."""

    experts: list[str]  # names of the T experts, in the order of `LayerRouting.load`
    layers: dict[str, LayerRouting]


class UnusedChange(_Section):
    """What the experts changed outside the upscaled layers, and an upscaled model does not use."""

    share: float  # of the experts' total change Σ‖Δ‖², from 0 to 1
    largest: dict[str, float] = Field(default_factory=dict)  # names of the largest tensors → their share


class Environment(_Section):
    """Hardware and software of a run."""

    python: str
    platform: str
    accelerator: str  # name of the GPU, or cpu and the model of the processor
    processes: int
    threads: int  # CPU threads of PyTorch in each process
    packages: dict[str, str]  # name → version of all installed packages
    git_revision: str | None = None  # commit of the working directory, -dirty with changes; None outside of git


class RunReport(_Section):
    """The report of one run."""

    schema_version: Literal[1] = 1
    status: Literal["complete", "failed"]
    error: str | None = None
    label: str  # name of the method in tables
    benchmark: str  # runs of the same benchmark are comparable
    kind: Literal["merged", "individual"] = "merged"  # one model, or the fine-tuned ones, each on its own task
    method: dict[str, Any]  # its resolved configuration
    models: list[str] = Field(default_factory=list)  # names of the fine-tuned models
    modelpool: str  # name of its configuration
    taskpool: str  # name of its configuration
    seed: int | None = None
    overrides: list[str] = Field(default_factory=list)  # of the command line
    config: dict[str, Any] = Field(default_factory=dict)  # resolved configuration of the run
    fingerprint: str  # hash of the configuration of the results: method, model pool, task pool, seed
    tasks: dict[str, TaskResult] = Field(default_factory=dict)
    average: float | None = None  # mean score of the tasks; None if a score is undefined
    retention: float | None = None  # average in % of the individual models' average; None if that is unknown
    objective: float | None = None  # what hyperparameter optimisation maximises, in %
    parameters: Count | None = None  # of the evaluated model; the sum over all models for individual ones
    pretrained_parameters: Count | None = None
    bytes: Count | None = None  # of the parameters in their stored dtypes
    pretrained_bytes: Count | None = None
    construction: Stage | None = None
    evaluation: Stage | None = None
    samples_per_second: float | None = None  # in the evaluation, by all processes, data loading included
    routing: Routing | None = None  # None for models without routers
    unused_change: UnusedChange | None = None  # None for models that are not upscaled, and where it is unknown
    environment: Environment
    started: AwareDatetime  # UTC
    finished: AwareDatetime  # UTC

    @model_validator(mode="after")
    def _check_error(self) -> RunReport:
        if self.status == "failed" and not self.error:
            raise ValueError("a failed run has an error")
        return self

    @property
    def parameter_ratio(self) -> float | None:
        """Number of parameters relative to the pretrained model; None if unknown."""
        return _ratio(self.parameters, self.pretrained_parameters)

    @property
    def byte_ratio(self) -> float | None:
        """Bytes of the parameters relative to the pretrained model; None if unknown."""
        return _ratio(self.bytes, self.pretrained_bytes)

    def write(self, folder: Path) -> Path:
        """Write the report into a folder, created if missing, atomically; the file is returned.

        An existing report of another configuration is kept in ``smile_report-<fingerprint>.json``, also where several
        processes write at once. There is a report at any time once there was one.
        Raises ReportError if nothing can be written there.
        """
        file = folder / REPORT_FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with folder_lock(folder):
                self._keep_other(file)
                write_atomically(file, self.model_dump_json(indent=1))
        except OSError as error:
            reason = f"{error.strerror or error}: choose another folder, or make room"
            raise ReportError(f"the report can't be written to {printable(folder)}: {reason}") from None
        return file

    def _keep_other(self, file: Path) -> None:
        """Copy the report of another configuration, if `file` is one, to a file with its fingerprint."""
        with suppress(ReportError):
            content = _read_file(file)
            other = _parse(content).fingerprint
            if other != self.fingerprint:
                safe = other if re.fullmatch(r"[\w-]{1,64}", other) else fingerprint({"fingerprint": other})
                write_atomically(file.with_name(f"{file.stem}-{safe}.json"), content)

    @classmethod
    def read(cls, file: Path) -> RunReport:
        """Read a report.

        Raises ReportError if the file is missing, is no JSON, has another schema version, or violates the schema. Its
        message has one line and does not name the file.
        """
        return _parse(_read_file(file))


def read_regular_file(file: Path) -> bytes:
    """The content of a file. Raises OSError if it is missing, unreadable, no regular file or too large for a report."""
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device may never end
        raise OSError("it is no regular file")
    if status.st_size > LARGEST_FILE:
        raise OSError(f"it has more than {LARGEST_FILE:,} bytes")
    return file.read_bytes()


def _read_file(file: Path) -> bytes:
    """The content of a report's file. Raises ReportError, see `RunReport.read`."""
    try:
        return read_regular_file(file)
    except FileNotFoundError:
        raise ReportError("no report: the run was a dry run, was killed, or still goes on") from None
    except OSError as error:
        raise ReportError(f"the report can't be read: {error.strerror or error}") from None


def _parse(content: bytes) -> RunReport:
    """The report in the content of a file. Raises ReportError, see `RunReport.read`."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ReportError(f"the report can't be read: {printable(error)}") from None
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        shown = printable(version, 20) if isinstance(version, (str, int, float, type(None))) else "no number"
        raise ReportError(f"its schema version is {shown}, supported is {SCHEMA_VERSION}: run it again")
    try:
        return RunReport.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        location = ".".join(printable(part, 60) for part in first["loc"]) or "the report"
        raise ReportError(f"{location}: {printable(first['msg'])}") from None


def fingerprint(config: Mapping[str, Any]) -> str:
    """Hash of a configuration: the first 12 hexadecimal digits of the SHA-256 of its JSON with sorted keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:12]


def task_results(report: Mapping[str, Any]) -> dict[str, TaskResult]:
    """The task results in the report of a task pool of the framework: task name → metrics, or a single number.

    The score is the first metric of `PERCENT_SCALES` that the task has, or its first number.
    """
    results = {}
    for name, value in report.items():
        metrics = _numbers(value if isinstance(value, Mapping) else {"score": value})
        if name in RESERVED_ENTRIES or not metrics:
            continue
        metric = next((key for key in PERCENT_SCALES if key in metrics), next(iter(metrics)))
        first, samples = metrics[metric], metrics.pop("samples", None)
        results[name] = TaskResult(
            metric=metric, score=None if first is None else first * PERCENT_SCALES.get(metric, 1.0), metrics=metrics,
            samples=None if samples is None else int(samples),
        )  # fmt: skip
    return results


def average_of(tasks: Mapping[str, TaskResult]) -> float | None:
    """Mean score of some tasks; None if one is undefined, without tasks, and beyond the range of floats."""
    scores = [task.score for task in tasks.values() if task.score is not None]
    return _finite(sum(scores) / len(scores)) if scores and len(scores) == len(tasks) else None


def retention_of(tasks: Mapping[str, TaskResult], individual: Mapping[str, TaskResult]) -> float | None:
    """Retention: the mean score in percent of the individual models' mean score on the same tasks.

    None if a score is undefined, a task of the merged model is missing in `individual`, or beyond the range of floats.
    """
    if not set(tasks) <= set(individual):
        return None
    average, reference = average_of(tasks), average_of({name: individual[name] for name in tasks})
    return None if average is None or not reference else _finite(100 * average / reference)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _ratio(size: int | None, pretrained: int | None) -> float | None:
    return size / pretrained if size and pretrained else None


def _numbers(values: Mapping[str, Any]) -> dict[str, float | None]:
    """The numeric entries; None, NaN and infinite ones become None."""
    numbers = {key: value for key, value in values.items() if value is None or isinstance(value, (int, float))}
    return {key: None if value is None else _finite(float(value)) for key, value in numbers.items()}
