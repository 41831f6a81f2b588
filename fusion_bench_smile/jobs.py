"""The jobs of a sweep: which are done already, and which need processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from .ending import CLI
from .report import FILE, ReportError, RunReport


def latest(folder: Path, fingerprint: str) -> RunReport | None:
    """The report in a folder, if it is of the configuration with that fingerprint."""
    try:
        report = RunReport.read(folder / FILE)
    except ReportError:
        return None
    return report if report.fingerprint == fingerprint else None


def needs_own_processes(fabric: DictConfig | None) -> bool:
    """Whether this is a job of a sweep whose Fabric would start processes: each would repeat the whole sweep."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN or "LOCAL_RANK" in os.environ:
        return False
    settings: Any = fabric or {}
    return str(settings.get("devices", 1)) != "1" or int(settings.get("num_nodes") or 1) > 1


def run_apart(folder: Path, fingerprint: str, started: datetime) -> tuple[int, RunReport | None]:
    """Run this job as a command of its own, with its files in `folder`.

    Returns:
        The exit code, and the report that was written since `started`, if one was.
    """
    # within Slurm Fabric would wait for tasks that Slurm has started; this one starts its own processes
    environment = {**os.environ, "SLURM_JOB_NAME": "interactive"}
    code = subprocess.run(_command(folder), check=False, env=environment).returncode
    report = latest(folder, fingerprint)
    return code, report if report is not None and report.finished >= started else None


def _command(folder: Path) -> list[str]:
    hydra = HydraConfig.get()
    sources = {source.provider: source.path for source in hydra.runtime.config_sources}
    places = {"main": "--config-path", "command-line": "--config-dir"}
    found = [f"{option}={sources[provider]}" for provider, option in places.items() if provider in sources]
    own = ["hydra.mode=RUN", f'hydra.run.dir="{folder}"']
    return [sys.executable, "-m", CLI, *found, f"--config-name={hydra.job.config_name}", *hydra.overrides.task, *own]
