"""Jobs of a sweep: reports of earlier runs, and the command lines of jobs with several processes."""

import os
import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig

from ..reports import REPORT_FILE, ReportError, RunReport
from .errors import COMMAND_LINE


def process_rank() -> int:
    """The rank of this process among those that Fabric launched."""
    return getattr(rank_zero_only, "rank", 0)


def report_in(folder: Path, fingerprint: str) -> RunReport | None:
    """The report in a folder; None without one of the configuration with this fingerprint."""
    try:
        report = RunReport.read(folder / REPORT_FILE)
    except ReportError:
        return None
    return report if report.fingerprint == fingerprint else None


def needs_subprocess(fabric: DictConfig | None) -> bool:
    """Whether this is a job of a sweep whose Fabric, with this configuration, launches processes.

    Each process that Fabric launches repeats the command line, and so the whole sweep; a subprocess runs the job alone.
    """
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN or "LOCAL_RANK" in os.environ:
        return False
    settings: Any = fabric or {}
    return str(settings.get("devices", 1)) != "1" or int(settings.get("num_nodes") or 1) > 1


def command_of_job(folder: Path) -> list[str]:
    """The command line of this job, as a single run."""
    hydra = HydraConfig.get()
    folders = {source.provider: source.path for source in hydra.runtime.config_sources}
    options = {"main": "--config-path", "command-line": "--config-dir"}
    search_path = [f"{option}={folders[provider]}" for provider, option in options.items() if provider in folders]
    single_run = ["hydra.mode=RUN", f'hydra.run.dir="{folder}"']
    name = f"--config-name={hydra.job.config_name}"
    return [sys.executable, "-m", COMMAND_LINE, *search_path, name, *hydra.overrides.task, *single_run]
