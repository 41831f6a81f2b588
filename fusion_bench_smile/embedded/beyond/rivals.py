"""Merging methods of the framework on both benchmarks, with what validation inputs choose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle
from typing import Any

import torch
from fusion_bench.method.adamerging.layer_wise_adamerging import LayerWiseAdaMergingAlgorithm
from fusion_bench.method.task_arithmetic import TaskArithmeticAlgorithm
from fusion_bench.method.ties_merging.ties_merging import TiesMergingAlgorithm
from fusion_bench.modelpool.base_pool import BaseModelPool
from omegaconf import OmegaConf
from torch import Tensor, nn

from .benches import Bench

SCALING = {"Task Arithmetic": (0.1, 0.2, 0.3, 0.5), "TIES": (0.3, 0.5, 0.7, 1.0)}
# as for the embedded benchmark
ADAMERGING = {
    "name": "layer_wise_adamerging", "optimizer": "adam", "lr": 0.01, "max_steps": 20, "init_values": 0.3,
    "clamp_weights": False, "tie_weights": True, "strict": False, "weights": None, "save_merging_weights": False,
}  # fmt: skip
ADAPTED_ON = 16  # inputs of each task in a step

METHODS: dict[str, Callable[[float], Any]] = {
    "Task Arithmetic": lambda scale: TaskArithmeticAlgorithm(scaling_factor=scale),
    "TIES": lambda scale: TiesMergingAlgorithm(scaling_factor=scale, threshold=20, remove_keys=[], merge_func="sum"),
}


class AdaMerging(LayerWiseAdaMergingAlgorithm):
    """The framework's layer-wise AdaMerging (arXiv 2310.02575) on a bench: it adapts to the test inputs, unlabelled."""

    def __init__(self, at: Bench) -> None:
        super().__init__(OmegaConf.create(ADAMERGING))
        self.at = at

    @cache  # noqa: B019  one for each run
    def get_shuffled_test_loader_iter(self, task: str) -> Iterator[list[Any]]:  # type: ignore[override]
        generator, parts = torch.Generator().manual_seed(0), []
        for batch, labels in self.at.batches(task, "test"):
            order = torch.randperm(len(labels), generator=generator).split(ADAPTED_ON)
            parts += [{key: value[part] for key, value in batch.items()} for part in order]
        shuffled = torch.randperm(len(parts), generator=generator).tolist()
        return cycle([[parts[number]] for number in shuffled])

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nowhere: the study has no logger, and keeps tables of its own."""

    def compute_logits(self, module: nn.Module, images: Any, task: str) -> Tensor:
        return self.at.logits(module, images, task)


def pool(at: Bench) -> BaseModelPool:
    return BaseModelPool({"_pretrained_": at.pretrained(), **at.experts()})


def merged(at: Bench, scaling: dict[str, float]) -> Iterator[tuple[str, nn.Module]]:
    """Every method's model; `scaling` is of Task Arithmetic and TIES."""
    for name, method in METHODS.items():
        yield name, method(scaling[name]).run(pool(at)).eval()
    yield "AdaMerging", AdaMerging(at).run(pool(at)).eval()


def best_scaling(at: Bench, average: Callable[[nn.Module], float]) -> dict[str, float]:
    """What gives the highest average."""
    return {
        name: max(scales, key=lambda scale: average(METHODS[name](scale).run(pool(at)).eval()))
        for name, scales in SCALING.items()
    }
