"""Reports of the framework's own program, for runs without ``+experiment=smile_run``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from .labels import label_of
from .report import (
    Environment,
    ReportError,
    RunReport,
    average_of,
    fingerprint,
    read_regular_file,
    task_results,
)

PROGRAM_REPORT_FILE = "program_report.json"  # the framework's default for ``report_save_path``
CONFIG_FILE, HYDRA_FILE = "config.yaml", "hydra.yaml"  # Hydra writes them beside it
UNKNOWN = Environment(python="", platform="", accelerator="", processes=1, threads=1, packages={})


def read_program_report(folder: Path) -> RunReport:
    """The results that the framework's program left in a folder, as a report without resources and environment.

    Label, pools and benchmark come from the configuration that Hydra wrote. Raises ReportError if a file is missing or
    cannot be read.
    """
    file = folder / PROGRAM_REPORT_FILE
    try:
        values = json.loads(read_regular_file(file))
        config, hydra = (yaml.safe_load(read_regular_file(folder / name)) for name in (CONFIG_FILE, HYDRA_FILE))
        written = datetime.fromtimestamp(file.stat().st_mtime, timezone.utc)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = str(error).partition("\n")[0]
        raise ReportError(f"the report of the framework's program can't be read: {reason}") from None
    if not all(isinstance(part, dict) for part in (values, config, hydra)):
        raise ReportError("the report of the framework's program can't be read: it holds no results of tasks")
    return _report(values, dict(config), dict(hydra), written)


def _report(
    values: Mapping[str, Any], config: dict[str, Any], hydra: Mapping[str, Any], written: datetime
) -> RunReport:
    method = config.get("method") if isinstance(config.get("method"), dict) else {}
    modelpool, taskpool = (_choice(config, hydra, name) for name in ("modelpool", "taskpool"))
    info, tasks = values.get("model_info"), task_results(values)
    parameters = info.get("all_params") if isinstance(info, dict) else None
    determining = {name: config.get(name) for name in ("method", "modelpool", "taskpool", "seed", "fast_dev_run")}
    return RunReport(
        status="complete", label=label_of(method or {}), benchmark=f"{modelpool} · {taskpool}", method=method or {},
        modelpool=modelpool, taskpool=taskpool, config=config, fingerprint=fingerprint(determining), tasks=tasks,
        average=average_of(tasks), parameters=parameters if isinstance(parameters, int) else None,
        environment=UNKNOWN, started=written, finished=written,
    )  # fmt: skip


def _choice(config: Mapping[str, Any], hydra: Mapping[str, Any], name: str) -> str:
    """The name of a configuration group's option, or the class it configures."""
    section: Any = hydra.get("hydra")
    for key in ("runtime", "choices", name):
        section = section.get(key) if isinstance(section, dict) else None
    target = config[name].get("_target_") if isinstance(config.get(name), dict) else None
    return str(section or target or "unknown")
