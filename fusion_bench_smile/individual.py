"""The individual fine-tuned models, each on its own task: what every other method is measured against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fusion_bench.method.base_algorithm import BaseAlgorithm
from fusion_bench.modelpool.base_pool import BaseModelPool
from omegaconf import DictConfig, OmegaConf
from torch import nn

from .errors import PlanError
from .modelpool import load_model

TASKS = ("test_datasets", "tasks")  # where the task pools of the framework, and ours, list their tasks


class IndividualModels:
    """The models of a pool, loaded one at a time."""

    def __init__(self, pool: BaseModelPool) -> None:
        self._pool = pool

    def items(self) -> Iterator[tuple[str, nn.Module]]:
        """Name and model; not `__iter__`, which the framework would take for models to evaluate on all tasks."""
        for name in self._pool.model_names:
            yield name, load_model(self._pool, name)


class IndividualModelsAlgorithm(BaseAlgorithm):
    """Returns the experts of a pool as they are; `ReportingFusionProgram` evaluates each on the task of its name."""

    def run(self, modelpool: BaseModelPool) -> IndividualModels:
        return IndividualModels(modelpool)


def own_task(taskpool: DictConfig, expert: str) -> DictConfig:
    """The configuration of a task pool with the one task that has an expert's name.

    Raises:
        PlanError: if there is no such task.
    """
    where = next((key for key in TASKS if key in taskpool), TASKS[0])
    tasks: Sequence[str] = list(taskpool.get(where) or [])
    if expert not in tasks:
        raise PlanError(
            f"the task pool has no task of the expert {expert!r}; its tasks are: {', '.join(tasks) or 'unknown'}"
        )
    alone = taskpool.copy()
    OmegaConf.set_struct(alone, False)
    alone[where] = {expert: taskpool[where][expert]}
    return alone
