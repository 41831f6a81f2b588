"""RegMean and AdaMerging of the framework for a backbone with a head for each task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from fusion_bench.method.adamerging.layer_wise_adamerging import LayerWiseAdaMergingAlgorithm
from fusion_bench.method.regmean.regmean import RegMeanAlgorithm
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F

from smile_zoo.dinov2 import load_head
from smile_zoo.dinov2.task_pool import features, to_pixels


class BackboneRegMean(RegMeanAlgorithm):
    """RegMean (arXiv 2212.09849): least squares on the inputs of the linear layers, from training images."""

    num_regmean_examples: int  # set by the framework

    @torch.no_grad()
    def get_regmean_weights(
        self, model_name: str, model: nn.Module, train_dataset: Any, linear_modules_to_merge: Mapping[str, nn.Module]
    ) -> dict[str, Tensor]:
        """The second moments of the inputs of each linear layer: name → (in, in)."""
        moments: dict[str, Tensor] = {}

        def record(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                inputs = args[0].detach().flatten(0, -2)
                moments[name] = moments.get(name, 0) + inputs.T @ inputs / len(inputs)

            return hook

        handles = [module.register_forward_hook(record(name)) for name, module in linear_modules_to_merge.items()]
        for pixels in train_dataset[: self.num_regmean_examples]["pixel_values"].split(50):
            model.eval()(pixel_values=pixels)
        for handle in handles:
            handle.remove()
        return moments


class BackboneAdaMerging(LayerWiseAdaMergingAlgorithm):
    """Layer-wise AdaMerging (arXiv 2310.02575): test-time adaptation on unlabelled test images."""

    modelpool: Any  # set by the framework

    def __init__(self, **options: Any) -> None:
        super().__init__(DictConfig(options))
        self._batches: dict[str, Iterator[list[Tensor]]] = {}

    def get_shuffled_test_loader_iter(self, task: str) -> Iterator[list[Tensor]]:  # type: ignore[override]
        """Batches of the test images of a task without end, shuffled anew in each round."""
        if task not in self._batches:
            self._batches[task] = self._shuffled(task)
        return self._batches[task]

    def compute_logits(self, module: nn.Module, images: Tensor, task: str) -> Tensor:
        """The logits (N, C) of the task's head on images (N, 3, 56, 56)."""
        return F.linear(features(module, images), *(each.to(images.device) for each in load_head(task)))

    def _shuffled(self, task: str) -> Iterator[list[Tensor]]:
        pixels = self.fabric.to_device(to_pixels(self.modelpool.load_test_dataset(task)["image"]))
        while True:
            for index in torch.randperm(len(pixels)).split(self.config.batch_size):
                yield [pixels[index]]
