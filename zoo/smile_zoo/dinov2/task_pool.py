"""Image classification with one backbone and a head for each task, on any number of processes."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from fusion_bench.mixins import LightningFabricMixin
from fusion_bench.taskpool import BaseTaskPool
from torch import Tensor, nn
from torch.nn import functional as F

from fusion_bench_smile.exceptions import SmileError
from fusion_bench_smile.framework.task_pools import evaluate_in_batches, instantiate_config, model_info
from smile_zoo.heads import Head, load_head
from smile_zoo.loading import check_columns

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

log = logging.getLogger(__name__)

SIZE = 56  # pixels
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as DINOv2 was trained


def to_pixels(pictures: Sequence[Image]) -> Tensor:
    """Scale and normalise N images as the benchmark's image processor does: (N, 3, 56, 56), float32."""
    from PIL.Image import Resampling

    scaled = [picture.convert("RGB").resize((SIZE, SIZE), Resampling.BICUBIC) for picture in pictures]
    values = torch.from_numpy(np.stack([np.asarray(picture) for picture in scaled])).permute(0, 3, 1, 2) / 255
    return (values - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def features(model: nn.Module, pixels: Tensor) -> Tensor:
    """The features that DINOv2's linear evaluation uses: the class token and the mean of the patches.

    Args:
        model: a `Dinov2Model` of width D.
        pixels: images, (N, 3, 56, 56).

    Returns:
        (N, 2·D), in the dtype of the model.
    """
    hidden = model(pixel_values=pixels).last_hidden_state  # (N, 1 + patches, D)
    return torch.cat([hidden[:, 0], hidden[:, 1:].mean(dim=1)], dim=-1)


class ImageClassificationTaskPool(LightningFabricMixin, BaseTaskPool):
    """Evaluates a backbone on image classification tasks. Each task has its head, which is not part of the model.

    Args:
        tasks: task → ``dataset``, a data set with the columns ``image`` and ``label`` (class index), or its
            configuration, and ``head``, a `Head`, its file, or its configuration.
        batch_size: of each process.
        max_samples: evaluate the first images of each task only; None for all.
        fast_dev_run: evaluate one batch of each task.
    """

    def __init__(
        self, tasks: Mapping[str, Mapping[str, Any]], *, batch_size: int = 50, max_samples: int | None = None,
        fast_dev_run: bool | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(**kwargs)
        self._tasks = tasks
        self.batch_size, self.max_samples, self.fast_dev_run = batch_size, max_samples, bool(fast_dev_run)

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, name: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Evaluate a backbone on all tasks.

        Args:
            model: the backbone.
            name: of the model, for the report.

        Returns:
            ``model_info``; for each task ``accuracy``, from 0 to 1, and ``samples``; ``average`` with the mean
            ``accuracy``.

        Raises:
            SmileError: for a data set that is empty or lacks a column, or a head that doesn't fit.
        """
        model = self.fabric.to_device(model).eval()
        report: dict[str, Any] = {"model_info": model_info(model, name)}
        for task, entry in self._tasks.items():
            outcomes = self._outcomes(model, load_head(entry["head"]), instantiate_config(entry["dataset"]), task)
            report[task] = {"accuracy": sum(outcomes) / len(outcomes), "samples": len(outcomes)}
            log.info("%s: %s", task, report[task])
        report["average"] = {"accuracy": statistics.fmean(report[task]["accuracy"] for task in self._tasks)}
        return report

    def _outcomes(self, model: nn.Module, head: Head, dataset: Dataset, task: str) -> list[bool]:
        """Whether each image is classified right."""
        labels = _labels(task, dataset, len(head.bias))[: self.max_samples]
        device = self.fabric.device
        weight, bias = head.weight.to(device), head.bias.to(device)

        def classify(indices: Sequence[int]) -> list[bool]:
            pixels = to_pixels(dataset[list(indices)]["image"]).to(device)
            embedded = features(model, pixels).float()
            if embedded.shape[-1] != weight.shape[-1]:
                raise SmileError(f"{task}: the head takes {weight.shape[-1]} values, got {embedded.shape[-1]}")
            classes = F.linear(embedded, weight, bias).argmax(dim=-1).tolist()
            return [predicted == labels[index] for predicted, index in zip(classes, indices, strict=True)]

        order = range(len(labels))
        return evaluate_in_batches(order, self.batch_size, classify, task=task, fast_dev_run=self.fast_dev_run)


def _labels(task: str, dataset: Dataset, classes: int) -> list[int]:
    """The labels of a data set. Raises SmileError if it is empty, lacks a column, or the head lacks a class."""
    check_columns(task, dataset, "image", "label")
    labels = list(dataset["label"])
    if max(labels) >= classes:
        raise SmileError(f"{task}: the head has {classes} classes, a label is {max(labels)}")
    return labels
