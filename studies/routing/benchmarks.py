"""The image and the text benchmark behind one interface, for studies that evaluate every model on every task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BatchEncoding, BertModel, CLIPModel, CLIPProcessor, CLIPVisionModel

from smile_zoo import images, text
from smile_zoo.heads import Head
from smile_zoo.images.evaluate import zero_shot_head
from smile_zoo.loading import with_adapter
from smile_zoo.text.evaluate import arrays
from smile_zoo.text.task_pool import mean_pooled_embeddings, tokenize_batch
from studies.images import labelled_pixels
from studies.routing.variants import CALIBRATION_SIZES

SEEDS = (0, 1, 2)  # of the experts that recipes.images.seeds fine-tunes
BATCH_SIZE = 100

Batch = tuple[dict[str, Any], Tensor]  # arguments of a model for B inputs, and their labels (B,)


class Benchmark(ABC):
    """A benchmark with one set of experts, as ``python -m recipes.images.seeds FOLDER`` makes them.

    Args:
        root: FOLDER.
        expert_set: Name of the set.
        seed: Seed of the fine-tuning.

    Attributes:
        tasks: Names of the T tasks, which are those of the experts, in their order.
        counts: Split → number of inputs of each task that are used, the first ones of the split.
    """

    tasks: tuple[str, ...]
    counts: Mapping[str, int]

    def __init__(self, root: Path, expert_set: str, seed: int) -> None:
        self.root, self.expert_set, self.seed = root, expert_set, seed

    def folder(self, task: str) -> Path:
        """The folder of an expert."""
        return self.root / "experts" / self.expert_set / str(self.seed) / task

    @abstractmethod
    def pretrained(self) -> nn.Module:
        """The pretrained model, in evaluation mode."""

    @abstractmethod
    def expert(self, task: str) -> nn.Module:
        """The model that was fine-tuned on a task."""

    @abstractmethod
    def batches(self, task: str, split: images.Split) -> list[Batch]:
        """The inputs of a task, as keyword arguments of the model, with their labels."""

    @abstractmethod
    def logits(self, model: nn.Module, batch: Mapping[str, Any], task: str) -> Tensor:
        """The logits (B, classes) of a model for inputs of a task."""

    def experts(self) -> dict[str, nn.Module]:
        """Task → expert, in evaluation mode."""
        return {task: self.expert(task).eval() for task in self.tasks}

    @torch.no_grad()
    def correct(self, model: nn.Module, task: str, split: images.Split) -> Tensor:
        """Whether a model classifies each of the N inputs of a task correctly: (N,), bool."""
        batches = self.batches(task, split)
        return torch.cat([self.logits(model, batch, task).argmax(-1) == labels for batch, labels in batches])


class ImageBenchmark(Benchmark):
    """The image benchmark, with zero-shot heads from the frozen text tower."""

    tasks = images.TASKS
    counts = MappingProxyType({"train": CALIBRATION_SIZES[-1], "validation": 50, "test": 100})

    def pretrained(self) -> nn.Module:
        """The vision tower of the pretrained CLIP."""
        return images.load_pretrained().eval()

    def expert(self, task: str) -> nn.Module:
        """The vision tower that was fine-tuned on a task."""
        return CLIPVisionModel.from_pretrained(self.folder(task), torch_dtype=torch.float32)

    def batches(self, task: str, split: images.Split) -> list[Batch]:
        """Pixels (B, 3, 28, 28) and labels."""
        (pixels, labels), count = _labelled_pixels(task, split), self.counts[split]
        pairs = zip(pixels[:count].split(BATCH_SIZE), labels[:count].split(BATCH_SIZE), strict=True)
        return [({"pixel_values": x}, y) for x, y in pairs]

    def logits(self, model: nn.Module, batch: Mapping[str, Any], task: str) -> Tensor:
        """Scaled cosine similarities to the text embeddings of the classes: (B, classes)."""
        embeds = _clip().visual_projection(model(**batch).pooler_output)
        return _clip().logit_scale.exp().detach() * F.normalize(embeds, dim=-1) @ _image_head(task).T


class TextBenchmark(Benchmark):
    """The text benchmark; every expert has a head that was trained with it."""

    tasks = text.TASKS
    counts = MappingProxyType({"train": CALIBRATION_SIZES[-1], "validation": 30, "test": 100})

    def pretrained(self) -> nn.Module:
        """The pretrained encoder."""
        return text.load_pretrained().eval()

    def expert(self, task: str) -> nn.Module:
        """The encoder that was fine-tuned on a task."""
        if self.expert_set == "lora":
            return with_adapter(text.load_pretrained(), self.folder(task))
        return BertModel.from_pretrained(self.folder(task), torch_dtype=torch.float32)

    def batches(self, task: str, split: images.Split) -> list[Batch]:
        """Tokenized texts and labels."""
        return _text_batches(task, split, self.counts[split])

    def logits(self, model: nn.Module, batch: Mapping[str, Any], task: str) -> Tensor:
        """The logits of the expert's head: (B, classes)."""
        return F.linear(mean_pooled_embeddings(model, BatchEncoding(dict(batch))), *_text_head(self.folder(task)))


def load_benchmark(root: Path, expert_set: str, seed: int) -> Benchmark:
    """The benchmark of a set of experts: ``gentle``, ``strong``, ``full`` or ``lora``."""
    return (ImageBenchmark if expert_set in images.STRENGTHS else TextBenchmark)(root, expert_set, seed)


@cache
def _clip() -> CLIPModel:
    return CLIPModel.from_pretrained(images.DATA / "clip", torch_dtype=torch.float32).eval()


@cache
def _image_head(task: str) -> Tensor:
    return zero_shot_head(_clip(), CLIPProcessor.from_pretrained(images.DATA / "clip", use_fast=False), task)


@cache
def _labelled_pixels(task: str, split: images.Split) -> tuple[Tensor, Tensor]:
    return labelled_pixels(task, split)


@cache
def _text_head(folder: Path) -> Head:
    return Head.load(folder / text.HEAD)


@cache
def _text_batches(task: str, split: images.Split, count: int) -> list[Batch]:
    texts, labels = arrays(text.load_texts(task, split), task)
    tokenizer = text.load_tokenizer()
    order = list(range(min(count, len(texts))))
    if split != "train":  # calibration takes the first inputs, in the order of the data
        order.sort(key=lambda i: len(str(texts[i])))  # batches of similar lengths have little padding
    parts = [order[start : start + BATCH_SIZE] for start in range(0, len(order), BATCH_SIZE)]
    return [(dict(tokenize_batch(tokenizer, [texts[i] for i in part])), labels[part]) for part in parts]
