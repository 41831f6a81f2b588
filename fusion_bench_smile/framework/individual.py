"""The individual fine-tuned models, each evaluated on its own task: the reference for retention."""

from collections.abc import Iterator

from fusion_bench.method.base_algorithm import BaseAlgorithm
from fusion_bench.modelpool.base_pool import BaseModelPool
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..exceptions import PlanError
from .model_pools import load_model

TASK_KEYS = ("test_datasets", "tasks")  # where task pools list their tasks: the framework's and ours


class IndividualModels:
    """The fine-tuned models of a pool, loaded one at a time."""

    def __init__(self, pool: BaseModelPool) -> None:
        self._pool = pool

    def items(self) -> Iterator[tuple[str, nn.Module]]:
        """Load the models one after the other, as pairs of name and model.

        There is no `__iter__`: the framework evaluates every model of an iterable on all tasks.

        Raises:
            PlanError: naming a model that can't be loaded.
        """
        for name in self._pool.model_names:
            yield name, load_model(self._pool, name)


class IndividualModelsAlgorithm(BaseAlgorithm):
    """Returns the experts of a pool unchanged. `ReportingFusionProgram` evaluates each on the task of its name."""

    def run(self, modelpool: BaseModelPool) -> IndividualModels:
        """The experts of `modelpool`; nothing is loaded yet."""
        return IndividualModels(modelpool)


def single_task_config(taskpool: DictConfig, task: str) -> DictConfig:
    """A copy of the configuration of a task pool with one of its tasks alone.

    Raises:
        PlanError: if the task pool has no such task.
    """
    key = next((key for key in TASK_KEYS if key in taskpool), TASK_KEYS[0])
    tasks = list(taskpool.get(key) or [])
    if task not in tasks:
        names = ", ".join(tasks) or "unknown"
        raise PlanError(f"the task pool has no task of the expert {task!r}; its tasks are: {names}")
    config = taskpool.copy()
    OmegaConf.set_struct(config, False)
    config[key] = {task: taskpool[key][task]}
    return config
