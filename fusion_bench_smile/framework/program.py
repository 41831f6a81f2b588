"""The framework's fusion program with a `RunReport` for every run, in sweeps that can be resumed."""

import json
import logging
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from fusion_bench.method.base_algorithm import BaseAlgorithm
from fusion_bench.modelpool.base_pool import BaseModelPool
from fusion_bench.programs.fabric_fusion_program import FabricModelFusionProgram
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from .. import reports
from ..config import with_own_names
from ..exceptions import CheckpointError, PlanError, SmileError
from ..io import metadata_of, write_atomically
from ..nn import count_bytes, count_parameters, routing_statistics
from ..reports import REPORT_FILE, LayerRouting, ReportError, ResourceMeter, RunReport, TaskResult, average_of
from .jobs import command_of_job, needs_subprocess, process_rank, report_in
from .lm_eval import evaluate_with_lm_eval, is_lm_eval
from .method import DEFAULTS
from .model_pools import PRETRAINED, load_model
from .run_summary import print_summary

log = logging.getLogger(__name__)

SMILE = "fusion_bench_smile.SmileUpscalingAlgorithm"
WITHOUT_EFFECT = ("device", "factor_cache", "upscaling_accelerator")  # options that leave a method's result as it is
INTERPOLATION_KEYS = ("study", "tuned", "split")  # of the configuration, read by interpolations alone
TASK_KEYS = ("test_datasets", "tasks")  # where task pools list their tasks: the framework's and ours


class IndividualModels:
    """The fine-tuned models of a pool, the reference for retention, loaded one at a time."""

    def __init__(self, pool: BaseModelPool) -> None:
        self._pool = pool

    def items(self) -> Iterator[tuple[str, nn.Module]]:
        """Load the models one after the other, as pairs of name and model; a PlanError names one that can't be loaded.

        There is no `__iter__`: the framework evaluates every model of an iterable on all tasks.
        """
        for name in self._pool.model_names:
            yield name, load_model(self._pool, name)


class IndividualModelsAlgorithm(BaseAlgorithm):
    """Returns the experts of a pool unchanged. `ReportingFusionProgram` evaluates each on the task of its name."""

    def run(self, modelpool: BaseModelPool) -> IndividualModels:
        """The experts of `modelpool`; nothing is loaded yet. Raises PlanError in a program that can't evaluate them."""
        if self._program is not None and not isinstance(self._program, ReportingFusionProgram):
            raise PlanError(
                "method=smile_individual evaluates each model on the task of its name, which the framework's program "
                "can't do: add +experiment=smile_run"
            )
        return IndividualModels(modelpool)


class ReportingFusionProgram(FabricModelFusionProgram):
    """Runs a method and writes a `RunReport` beside the framework's report, also for a run that fails.

    A run is skipped if its folder has a complete report of the same configuration. Starting a killed sweep again thus
    runs what is missing. A job of a sweep with several processes runs in a subprocess: the processes that Fabric
    launches would repeat the whole sweep.

    Args:
        label: the name of the run in tables; None derives it from the method and its options.
        benchmark: the name under which runs are compared; None is model pool and task pool.
        individual: folder or file with the report of the individual models, for retention.
        budget: the largest parameter ratio with a positive objective; None for no limit.
        routing: record routing statistics in the report.
        redo: run even if there is a complete report.
        options: all others; see the framework's program.
    """

    def __init__(
        self, *args: Any, label: str | None = None, benchmark: str | None = None, individual: str | None = None,
        budget: float | None = None, routing: bool = True, redo: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **{key: value for key, value in options.items() if key not in INTERPOLATION_KEYS})
        self.label, self.benchmark, self.individual, self.budget = label, benchmark, individual, budget
        self.record_routing, self.redo = routing, redo
        self.measurements: dict[str, Any] = {}
        self._meter = ResourceMeter()
        self._merged_model: Any = None
        self._task_report: Any = None

    def run(self) -> dict[str, Any]:
        """The result of the framework's program, with the written `RunReport`, or None, under ``run_report``."""
        folder = self.folder
        earlier = None if self.redo else report_in(folder, self._fingerprint())
        if earlier is not None and earlier.status == "complete":
            log.info("%s is already complete: %s", earlier.label, folder / REPORT_FILE)
            return {"merged_model": None, "report": None, "run_report": earlier}
        return self._run_in_subprocess(folder) if needs_subprocess(self._fabric) else self._run(folder)

    def _instantiate_and_setup(self, config: DictConfig, *args: Any, **kwargs: Any) -> Any:
        instance = super()._instantiate_and_setup(config, *args, **kwargs)
        self._meter = ResourceMeter()  # after the last of pools and method, construction begins
        return instance

    def save_merged_model(self, merged_model: nn.Module) -> None:
        """Measure the construction that has ended, and save the model if there is a ``merged_model_save_path``."""
        self.measurements["construction"] = self._meter.stop()
        self._merged_model = merged_model
        if isinstance(merged_model, nn.Module):
            self.measurements |= {"parameters": count_parameters(merged_model), "bytes": count_bytes(merged_model)}
            self.measurements["unused_change"] = unused_change(merged_model)
        if self.merged_model_save_path is not None and isinstance(merged_model, IndividualModels):
            log.warning("merged_model_save_path: individual models are not saved, they are in the model pool already")
        elif self.merged_model_save_path is not None:
            super().save_merged_model(merged_model)

    def evaluate_merged_model(self, taskpool: Any, merged_model: Any, *args: Any, **kwargs: Any) -> Any:
        """The task pool's report of the model on all tasks, or of each individual model on its own task.

        The report of the method's result is kept, and an empty one returned, which the framework prints instead.
        """
        meter = ResourceMeter()
        if isinstance(merged_model, IndividualModels):
            report: Any = self._evaluate_individual(merged_model)
        else:
            with self._routing_recorded(merged_model):
                if is_lm_eval(taskpool) and isinstance(merged_model, nn.Module):
                    report = evaluate_with_lm_eval(taskpool, merged_model, self.folder)
                else:
                    report = super().evaluate_merged_model(taskpool, merged_model, *args, **kwargs)
        self.measurements["evaluation"] = meter.stop()
        if merged_model is self._merged_model:
            self._task_report = report
            return {}
        return report

    @property
    def folder(self) -> Path:
        """The folder of the run's files."""
        log_dir = self.path.get("log_dir") if self.path is not None else None
        return Path(log_dir or self.log_dir or ".")

    def _run(self, folder: Path) -> dict[str, Any]:
        started = datetime.now(timezone.utc)
        report_save_path, self.report_save_path = self.report_save_path, None  # every process would write that file
        try:
            result: Any = {**super().run(), "report": self._task_report}
            report = None if result["merged_model"] is None else self._complete_report(result["report"], started)
        except (Exception, SystemExit) as error:
            succeeded = isinstance(error, SystemExit) and error.code in (None, 0)
            if not succeeded and process_rank() == 0:
                self._record_failure(folder, started, error)
            raise
        if process_rank() == 0:
            self._show(report, result["report"], folder, report_save_path)
        return {**result, "run_report": report}

    def _show(self, report: RunReport | None, task_report: Any, folder: Path, report_save_path: str | None) -> None:
        """Write the reports and print a summary, or the task pool's report if there is no other."""
        if report_save_path is not None and task_report is not None:
            _write_task_report(task_report, Path(report_save_path.format(log_dir=folder)))
        if report is not None:
            individual = report.tasks if report.kind == "individual" else self._individual_tasks
            print_summary(report, report.write(folder), individual, Console())
        elif task_report is not None:
            print(json.dumps(task_report, indent=2, default=str))

    def _record_failure(self, folder: Path, started: datetime, error: BaseException) -> None:
        """Write the report of a failed run. If that fails too, it is logged: the error of the run is raised."""
        try:
            self._report(started, status="failed", error=_reason(error), **self.measurements).write(folder)
        except ReportError as problem:
            log.error("%s", problem)

    @contextmanager
    def _routing_recorded(self, model: Any) -> Iterator[None]:
        """Record routing statistics of an upscaled model inside the ``with`` block."""
        if not self.record_routing or not isinstance(model, nn.Module):
            yield
            return
        with routing_statistics(model) as statistics:
            yield
        layers = {name: LayerRouting(load=v.load, entropy=v.entropy) for name, v in statistics.items() if v.tokens}
        if layers:
            self.measurements["routing"] = reports.Routing(experts=list(self.modelpool.model_names), layers=layers)

    def _run_in_subprocess(self, folder: Path) -> dict[str, Any]:
        """Run this job of a sweep as a command line with files in `folder`, Hydra's output folder of the job."""
        started = datetime.now(timezone.utc)
        # within Slurm Fabric would wait for the tasks of the Slurm job, which is one: Fabric launches the processes
        environment = {**os.environ, "SLURM_JOB_NAME": "interactive"}
        code = subprocess.run(command_of_job(folder), check=False, env=environment).returncode
        report = report_in(folder, self._fingerprint())
        if report is not None and report.finished < started:
            report = None
        if report is None and code:
            reason = f"the processes ended with exit code {code}; see their output"
            report = self._report(started, status="failed", error=reason)
            report.write(folder)
        if report is not None and report.status == "failed":
            raise RuntimeError(report.error)
        return {"merged_model": None, "report": None, "run_report": report}

    def _evaluate_individual(self, models: IndividualModels) -> dict[str, Any]:
        """Evaluate each model on the task of its name, with a task pool of that task alone."""
        self.measurements["kind"] = "individual"
        report: dict[str, Any] = {}
        parameters = 0
        for name, model in models.items():
            taskpool = self._instantiate_and_setup(single_task_config(self._taskpool or DictConfig({}), name))
            parameters += count_parameters(model)
            report[name] = taskpool.evaluate(model)[name]
        self.measurements["parameters"] = parameters
        return report

    def _complete_report(self, task_report: Any, started: datetime) -> RunReport | None:
        """The report of a complete run; None if the task pool evaluated something else than one model."""
        tasks = reports.task_results(task_report) if isinstance(task_report, Mapping) else {}
        if not (tasks or task_report is None or "model_info" in task_report):
            log.warning("no %s: the report of the task pool is not that of one model on named tasks", REPORT_FILE)
            return None
        report = self._report(started, status="complete", tasks=tasks, average=average_of(tasks), **self.measurements)
        samples = [task.samples for task in tasks.values()]
        if report.evaluation is not None and None not in samples:
            report.samples_per_second = sum(filter(None, samples)) / report.evaluation.seconds
        if PRETRAINED in self.modelpool.all_model_names:
            model = load_model(self.modelpool, PRETRAINED)
            report.pretrained_parameters, report.pretrained_bytes = count_parameters(model), count_bytes(model)
        individual = tasks if report.kind == "individual" else self._individual_tasks
        report.retention = reports.retention_of(tasks, individual)
        report.objective = objective_of(report, self.budget)
        return report

    def _report(self, started: datetime, **measurements: Any) -> RunReport:
        config, hydra = self._resolved_config(), HydraConfig.get() if HydraConfig.initialized() else None
        choices = hydra.runtime.choices if hydra else {}
        pools = {name: str(choices.get(name) or config[name].get("_target_")) for name in ("modelpool", "taskpool")}
        fabric = self._fabric_instance
        device, processes = (fabric.device, fabric.world_size) if fabric is not None else (torch.device("cpu"), 1)
        return RunReport(
            label=self.label or reports.label_of(config["method"]), method=config["method"],
            benchmark=self.benchmark or " · ".join(pools.values()),
            models=[name for name in config["modelpool"].get("models") or {} if name != PRETRAINED],
            modelpool=pools["modelpool"], taskpool=pools["taskpool"], seed=self.seed, config=config,
            overrides=list(hydra.overrides.task) if hydra else [], fingerprint=self._fingerprint(),
            environment=reports.environment(device, processes), started=started, finished=datetime.now(timezone.utc),
            **measurements,
        )  # fmt: skip

    def _resolved_config(self) -> dict[str, Any]:
        """What determines the results: method, model pool, task pool, seed."""
        parts: dict[str, Any] = {"method": self._method, "modelpool": self._modelpool, "taskpool": self._taskpool}
        plain = {name: OmegaConf.to_container(part, resolve=True) for name, part in parts.items() if part is not None}
        plain["method"] = method_options(cast("dict[str, Any]", plain["method"]))
        return {"taskpool": {}, **plain, "seed": self.seed, "fast_dev_run": self.fast_dev_run}

    def _fingerprint(self) -> str:
        config = self._resolved_config()
        config["method"] = {key: value for key, value in config["method"].items() if key not in WITHOUT_EFFECT}
        return reports.fingerprint(config)

    @cached_property
    def _individual_tasks(self) -> dict[str, TaskResult]:
        """The results of the individual models; empty if their report is not there when they are first asked for."""
        if self.individual is None:
            return {}
        path = Path(self.individual)
        try:
            return RunReport.read(path / REPORT_FILE if path.is_dir() or not path.suffix else path).tasks
        except ReportError as error:
            log.debug("individual=%s: %s", path, error)  # it may run later; the leaderboard adds the retention
            return {}


def method_options(method: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a method as reports have them: those of SMILE under one name each, see `FRAMEWORK_NAMES`."""
    return with_own_names(method, DEFAULTS) if method.get("_target_") == SMILE else dict(method)


def single_task_config(taskpool: DictConfig, task: str) -> DictConfig:
    """A copy of a task pool's configuration with one of its tasks alone. Raises PlanError if it has no such task."""
    key = next((key for key in TASK_KEYS if key in taskpool), TASK_KEYS[0])
    tasks = list(taskpool.get(key) or [])
    if task not in tasks:
        names = ", ".join(tasks) or "unknown"
        raise PlanError(f"the task pool has no task of the expert {task!r}; its tasks are: {names}")
    config = taskpool.copy()
    OmegaConf.set_struct(config, False)
    config[key] = {task: taskpool[key][task]}
    return config


def unused_change(model: nn.Module) -> reports.UnusedChange | None:
    """What an upscaled model does not use of the experts' change; None for other models, and where it is unknown."""
    try:
        provenance = metadata_of(model).provenance
    except CheckpointError:
        return None
    share = provenance.unused_share
    return None if share is None else reports.UnusedChange(share=share, largest=provenance.largest_unused)


def objective_of(report: RunReport, budget: float | None) -> float | None:
    """The objective that an optimiser of a run's options maximises, in percent; None if it is undefined.

    It is the retention, or the average where the individual models are unknown. Above the budget, which is the largest
    parameter ratio, it is negative and falls with that ratio, so that every model within the budget is better.
    """
    if budget is not None and report.parameter_ratio is not None and report.parameter_ratio > budget:
        return 100 * (1 - report.parameter_ratio / budget)
    return report.average if report.retention is None else report.retention


def _write_task_report(report: Any, file: Path) -> None:
    """Write the report of a task pool as JSON. Raises ReportError if that is not possible."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(report, default=str))
    except OSError as error:
        raise ReportError(f"{file} can't be written: {error.strerror}: choose another report_save_path") from None


def _reason(error: BaseException) -> str:
    """The error of a failed run, as its report has it."""
    if isinstance(error, SystemExit):
        return str(error.code)
    return str(error) if isinstance(error, SmileError) else f"{type(error).__name__}: {error}"
