"""Results of lm-eval, which the framework's `LMEvalHarnessTaskPool` leaves in files, as a report of tasks."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning import Fabric
from torch import nn

from ..exceptions import SmileError
from .jobs import process_rank

TASK_POOL = "LMEvalHarnessTaskPool"
FOLDER = "lm_eval_results"


def is_lm_eval(taskpool: Any) -> bool:
    """Whether a task pool is the framework's for lm-eval, which must not be imported to know."""
    return any(parent.__name__ == TASK_POOL for parent in type(taskpool).__mro__)


def evaluate_with_lm_eval(taskpool: Any, model: nn.Module, folder: Path) -> dict[str, dict[str, Any]]:
    """Evaluate a model with the framework's task pool for lm-eval: task → metric → value.

    lm-eval reads "=" and "," in the path of its output as options, and folders of runs have both. It writes to a
    temporary folder, which is moved to the `output_path` of the pool, by default ``folder / lm_eval_results``. All
    processes but the first have no results: their report is empty. Raises SmileError if lm-eval wrote none.
    """
    target = Path(taskpool.output_path or folder / FOLDER)
    given = taskpool.output_path
    with tempfile.TemporaryDirectory(prefix="lm_eval_") as scratch:
        taskpool.output_path = scratch
        try:
            with _on_one_device(taskpool):
                taskpool.evaluate(model)
        finally:
            taskpool.output_path = given
        if process_rank() != 0:
            return {}
        files = sorted(Path(scratch).rglob("results_*.json"))
        if not files:
            raise SmileError("lm-eval wrote no results; see its output for the reason")
        report = task_report(json.loads(files[-1].read_text()), _names(taskpool.tasks))
        shutil.copytree(files[-1].parent, target, dirs_exist_ok=True)
    return report


@contextmanager
def _on_one_device(taskpool: Any) -> Iterator[None]:
    """Set a model up for one device inside the ``with`` block.

    lm-eval evaluates all examples in each process, and writes no results for a model that Fabric wraps for several.
    """
    fabric = taskpool.fabric
    if fabric.world_size == 1:
        yield
        return
    index = fabric.device.index
    taskpool.fabric = Fabric(accelerator=fabric.device.type, devices=1 if index is None else [index])
    try:
        yield
    finally:
        taskpool.fabric = fabric


def task_report(results: Mapping[str, Any], requested: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The metrics of the requested tasks and groups, or of all tasks, in the results of lm-eval.

    A metric has the name ``acc`` without a filter, and ``exact_match (strict-match)`` with one.
    """
    found = {**results.get("results", {}), **results.get("groups", {})}
    names = [name for name in requested if name in found] or list(found)
    samples = results.get("n-samples", {})
    report = {}
    for name in names:
        metrics = {_metric(key): value for key, value in found[name].items() if isinstance(value, (int, float))}
        effective = (samples.get(name) or {}).get("effective")
        report[name] = metrics if effective is None else {**metrics, "samples": effective}
    return report


def _metric(key: str) -> str:
    name, _, applied_filter = key.partition(",")
    return name if applied_filter in ("", "none") else f"{name} ({applied_filter})"


def _names(tasks: str | Sequence[str]) -> list[str]:
    return tasks.split(",") if isinstance(tasks, str) else [str(task) for task in tasks]
