"""The framework's fusion program, with a report that says what was measured, and sweeps that lose nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from fusion_bench.programs.fabric_fusion_program import FabricModelFusionProgram
from fusion_bench.utils.parameters import count_parameters
from hydra.core.hydra_config import HydraConfig
from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import nn

from .ending import one_clear_line
from .individual import IndividualModels, own_task
from .jobs import latest, needs_own_processes, run_apart
from .labels import label_of
from .modelpool import load_model
from .report import (
    FILE,
    ReportError,
    Routing,
    RunReport,
    TaskResult,
    average_of,
    fingerprint,
    retention_of,
    task_results,
    write_whole,
)
from .report import LayerRouting as LayerReport
from .routing import routing_statistics
from .storage import bytes_of
from .surroundings import Meter, environment

log = logging.getLogger(__name__)

PRETRAINED = "_pretrained_"
WITHOUT_EFFECT = ("device", "factor_cache", "upscaling_accelerator")  # on what a method computes
FOR_CONFIGURATIONS = ("study", "tuned", "split")  # root keys that only interpolations read


class ReportingFusionProgram(FabricModelFusionProgram):
    """Writes `RunReport` beside the framework's own report, whether the run ends well or not.

    A run whose report lies in its folder already, of the same configuration, is skipped: a sweep that was killed does
    what is missing when it is started again. A job of a sweep that needs several processes gets them for itself:
    those that Fabric starts would repeat the whole sweep.

    Args:
        label: the run's name in tables; None makes one of the method and its options.
        benchmark: runs with the same one can be compared; None is model pool and task pool.
        individual: a folder (or file) with the report of the individual models, for retention.
        budget: parameter ratio above which the objective counts as missed.
        routing: put what the routers do into the report.
        redo: run even if the report lies there.
        options: everything else; see the framework's program.
    """

    def __init__(
        self,
        *args: Any,
        label: str | None = None,
        benchmark: str | None = None,
        individual: str | None = None,
        budget: float | None = None,
        routing: bool = True,
        redo: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(*args, **{key: value for key, value in options.items() if key not in FOR_CONFIGURATIONS})
        self.label, self.benchmark, self.individual, self.budget = label, benchmark, individual, budget
        self.watch_routing, self.redo = routing, redo
        self.measurements: dict[str, Any] = {}
        self._meter = Meter()

    # -- what the framework calls

    def run(self) -> dict[str, Any]:
        """Run the method, evaluate, and write the report.

        Returns:
            What the framework's program returns, and the `RunReport` under ``run_report``, if one was written.
        """
        folder = self.folder
        done = None if self.redo else latest(folder, self._fingerprint())
        if done is not None and done.status == "complete":
            log.info("%s is done already: %s", done.label, folder / FILE)
            return {"merged_model": None, "report": None, "run_report": done}
        return self._run_apart(folder) if needs_own_processes(self._fabric) else self._run_here(folder)

    def _instantiate_and_setup(self, config: DictConfig, *args: Any, **kwargs: Any) -> Any:
        made = super()._instantiate_and_setup(config, *args, **kwargs)
        self._meter = Meter()  # pools and method stand: what follows is the method's run
        return made

    def save_merged_model(self, merged_model: nn.Module) -> None:
        self.measurements["construction"] = self._meter.stop()
        if isinstance(merged_model, nn.Module):
            self.measurements["parameters"] = count_parameters(merged_model)[1]
            self.measurements["bytes"] = bytes_of(merged_model)
        if self.merged_model_save_path is None:
            return
        if isinstance(merged_model, IndividualModels):
            log.warning("merged_model_save_path: the individual models are not saved, they lie where they were read")
        else:
            super().save_merged_model(merged_model)

    def evaluate_merged_model(self, taskpool: Any, merged_model: Any, *args: Any, **kwargs: Any) -> Any:
        report: Any
        meter = Meter()
        if isinstance(merged_model, IndividualModels):
            self.measurements["kind"] = "individual"
            with one_clear_line():
                report = self._evaluate_individual(merged_model)
        else:
            with self._watching(merged_model):
                report = super().evaluate_merged_model(taskpool, merged_model, *args, **kwargs)
        self.measurements["evaluation"] = meter.stop()
        return report

    # -- the parts of a run

    @property
    def folder(self) -> Path:
        """Where the run's files go."""
        where = self.path.get("log_dir") if self.path is not None else None
        return Path(where or self.log_dir or ".")

    def _run_here(self, folder: Path) -> dict[str, Any]:
        started = datetime.now(timezone.utc)
        theirs, self.report_save_path = self.report_save_path, None  # each process would write it
        try:
            result: Any = super().run()
            report = None if result["merged_model"] is None else self._complete(result["report"], started)
        except (Exception, SystemExit) as error:
            if isinstance(error, SystemExit) and error.code in (None, 0):
                raise
            if _first_process():
                self._report(started, status="failed", error=_reason(error), **self.measurements).write(folder)
            raise
        if report is not None and _first_process():
            if theirs is not None:
                file = Path(theirs.format(log_dir=folder))
                file.parent.mkdir(parents=True, exist_ok=True)
                write_whole(file, json.dumps(result["report"], default=str))
            log.info("report: %s", report.write(folder))
        return {**result, "run_report": report}

    @contextmanager
    def _watching(self, model: Any) -> Iterator[None]:
        if not self.watch_routing or not isinstance(model, nn.Module):
            yield
            return
        with routing_statistics(model) as routers:
            yield
        layers = {n: LayerReport(load=r.load, entropy=r.entropy) for n, r in routers.items() if r.tokens}
        if layers:
            self.measurements["routing"] = Routing(experts=list(self.modelpool.model_names), layers=layers)

    def _run_apart(self, folder: Path) -> dict[str, Any]:
        started = datetime.now(timezone.utc)
        code, report = run_apart(folder, self._fingerprint(), started)
        if report is None and code:
            reason = f"the processes ended with exit code {code}; their output says why"
            report = self._report(started, status="failed", error=reason)
            report.write(folder)
        if report is not None and report.status == "failed":
            raise RuntimeError(report.error)
        return {"merged_model": None, "report": None, "run_report": report}

    def _evaluate_individual(self, models: IndividualModels) -> dict[str, Any]:
        report: dict[str, Any] = {}
        total = 0
        for name, model in models.items():
            pool = self._instantiate_and_setup(own_task(self._taskpool or DictConfig({}), name))
            total += count_parameters(model)[1]
            report[name] = pool.evaluate(model)[name]
        self.measurements["parameters"] = total
        return report

    def _complete(self, report: Any, started: datetime) -> RunReport | None:
        """The report of a run that ended well; None where the task pool evaluated something else than one model."""
        tasks = task_results(report) if isinstance(report, Mapping) else {}
        if not (tasks or report is None or "model_info" in report):
            log.warning("no %s: the task pool's report isn't that of one model on named tasks", FILE)
            return None
        made = self._report(started, status="complete", tasks=tasks, average=average_of(tasks), **self.measurements)
        samples = [task.samples for task in tasks.values()]
        if made.evaluation is not None and None not in samples:
            made.samples_per_second = sum(filter(None, samples)) / made.evaluation.seconds
        if PRETRAINED in self.modelpool.all_model_names:
            pretrained = load_model(self.modelpool, PRETRAINED)
            made.pretrained_parameters, made.pretrained_bytes = count_parameters(pretrained)[1], bytes_of(pretrained)
        made.retention = retention_of(tasks, tasks if made.kind == "individual" else self._individual_tasks())
        made.objective = objective_of(made, self.budget)
        return made

    def _report(self, started: datetime, **measurements: Any) -> RunReport:
        config = self._resolved()
        initialized = HydraConfig.initialized()
        choices = HydraConfig.get().runtime.choices if initialized else {}
        pools = {name: str(choices.get(name) or config[name].get("_target_")) for name in ("modelpool", "taskpool")}
        fabric = self._fabric_instance
        return RunReport(
            label=self.label or label_of(config["method"]),
            benchmark=self.benchmark or " · ".join(pools.values()),
            method=config["method"],
            models=[name for name in config["modelpool"].get("models") or {} if name != PRETRAINED],
            modelpool=pools["modelpool"],
            taskpool=pools["taskpool"],
            seed=self.seed,
            overrides=list(HydraConfig.get().overrides.task) if initialized else [],
            config=config,
            fingerprint=self._fingerprint(),
            environment=environment(
                fabric.device if fabric is not None else torch.device("cpu"),
                fabric.world_size if fabric is not None else 1,
            ),
            started=started,
            finished=datetime.now(timezone.utc),
            **measurements,
        )

    def _resolved(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"method": self._method, "modelpool": self._modelpool, "taskpool": self._taskpool or {}}
        plain = {name: OmegaConf.to_container(part, resolve=True) for name, part in parts.items() if part is not None}
        return {"taskpool": {}, **plain, "seed": self.seed, "fast_dev_run": self.fast_dev_run}

    def _fingerprint(self) -> str:
        config = self._resolved()
        config["method"] = {key: value for key, value in config["method"].items() if key not in WITHOUT_EFFECT}
        return fingerprint(config)

    def _individual_tasks(self) -> dict[str, TaskResult]:
        if self.individual is None:
            return {}
        file = Path(self.individual)
        try:
            return RunReport.read(file / FILE if file.is_dir() or not file.suffix else file).tasks
        except ReportError as error:
            log.info("individual=%s: %s; the report is without retention, the leaderboard adds it", file, error)
            return {}


def objective_of(report: RunReport, budget: float | None) -> float | None:
    """What an optimiser maximises: retention, or the average where that is unknown, in percent.

    Above the budget of parameters it is negative, the more the farther: worse than any model within.
    """
    if budget is not None and report.ratio is not None and report.ratio > budget:
        return 100 * (1 - report.ratio / budget)
    return report.average if report.retention is None else report.retention


def _first_process() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def _reason(error: BaseException) -> str:
    text = str(error.code) if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
    return text.removeprefix("error: ")
