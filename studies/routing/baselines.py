"""Merging methods of the framework on both benchmarks, with scaling factors selected on the validation split."""

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

from studies.routing.benchmarks import Benchmark

SCALING_FACTORS = {"Task Arithmetic": (0.1, 0.2, 0.3, 0.5), "TIES": (0.3, 0.5, 0.7, 1.0)}
# the options of smile_row/adamerging.yaml
ADAMERGING = {
    "name": "layer_wise_adamerging", "optimizer": "adam", "lr": 0.01, "max_steps": 20, "init_values": 0.3,
    "clamp_weights": False, "tie_weights": True, "strict": False, "weights": None, "save_merging_weights": False,
}  # fmt: skip
ADAMERGING_BATCH_SIZE = 16  # inputs of each task in a step

METHODS: dict[str, Callable[[float], Any]] = {
    "Task Arithmetic": lambda scaling: TaskArithmeticAlgorithm(scaling_factor=scaling),
    "TIES": lambda scaling: TiesMergingAlgorithm(
        scaling_factor=scaling, threshold=20, remove_keys=[], merge_func="sum"
    ),
}


class AdaMerging(LayerWiseAdaMergingAlgorithm):
    """The framework's layer-wise AdaMerging (arXiv 2310.02575) on the unlabelled test inputs of a benchmark."""

    def __init__(self, benchmark: Benchmark) -> None:
        super().__init__(OmegaConf.create(ADAMERGING))
        self.benchmark = benchmark

    @cache  # noqa: B019  one iterator for each run
    def get_shuffled_test_loader_iter(self, task: str) -> Iterator[list[Any]]:  # type: ignore[override]
        """An endless iterator of batches of a task in random order."""
        generator, parts = torch.Generator().manual_seed(0), []
        for batch, labels in self.benchmark.batches(task, "test"):
            order = torch.randperm(len(labels), generator=generator).split(ADAMERGING_BATCH_SIZE)
            parts += [{key: value[part] for key, value in batch.items()} for part in order]
        shuffled = torch.randperm(len(parts), generator=generator).tolist()
        return cycle([[parts[number]] for number in shuffled])

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Log nothing: the study has no logger."""

    def compute_logits(self, module: nn.Module, images: Any, task: str) -> Tensor:
        """The logits of a model for a batch of a task."""
        return self.benchmark.logits(module, images, task)


def model_pool(benchmark: Benchmark) -> BaseModelPool:
    """The framework's model pool with the models of a benchmark."""
    return BaseModelPool({"_pretrained_": benchmark.pretrained(), **benchmark.experts()})


def merged_models(benchmark: Benchmark, scaling: dict[str, float]) -> Iterator[tuple[str, nn.Module]]:
    """Name and merged model of every method.

    Args:
        benchmark: The benchmark.
        scaling: Scaling factors of Task Arithmetic and TIES.
    """
    for name, method in METHODS.items():
        yield name, method(scaling[name]).run(model_pool(benchmark)).eval()
    yield "AdaMerging", AdaMerging(benchmark).run(model_pool(benchmark)).eval()  # type: ignore[arg-type]


def select_scaling(benchmark: Benchmark, score: Callable[[nn.Module], float]) -> dict[str, float]:
    """The scaling factor of each method that gives the merged model with the highest score."""
    return {
        name: max(factors, key=lambda factor: score(METHODS[name](factor).run(model_pool(benchmark)).eval()))
        for name, factors in SCALING_FACTORS.items()
    }
