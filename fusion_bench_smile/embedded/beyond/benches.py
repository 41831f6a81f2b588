"""Both embedded benchmarks behind one face, for studies that run every model on every task themselves."""

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
from transformers import BertModel, CLIPModel, CLIPProcessor, CLIPVisionModel

from ...text_classification import Head, batch_of, embed
from .. import DATA, STRENGTHS, TASKS, load_pretrained, measure, text
from ..evaluate import zero_shot_head
from ..shipped import with_adapter
from ..text.evaluate import arrays
from .variants import CALIBRATION

BATCH = 100


class Bench(ABC):
    """A benchmark with experts from several seeds, as ``embedded.build.seeds`` makes them.

    Args:
        root: the folder that was given to it.
        chosen: the set of experts.
        seed: theirs.

    Attributes:
        counts: for each split, how many inputs of each task are looked at, the first ones.
    """

    tasks: tuple[str, ...]
    counts: Mapping[str, int]

    def __init__(self, root: Path, chosen: str, seed: int) -> None:
        self.root, self.chosen, self.seed = root, chosen, seed

    def folder(self, task: str) -> Path:
        """Where an expert lies."""
        return self.root / "experts" / self.chosen / str(self.seed) / task

    @abstractmethod
    def pretrained(self) -> nn.Module: ...

    @abstractmethod
    def expert(self, task: str) -> nn.Module: ...

    @abstractmethod
    def batches(self, task: str, split: str) -> list[tuple[dict[str, Any], Tensor]]:
        """Inputs of a task, as arguments of the model, and their labels."""

    @abstractmethod
    def logits(self, model: nn.Module, batch: Mapping[str, Any], task: str) -> Tensor:
        """(B, classes)."""

    def experts(self) -> dict[str, nn.Module]:
        return {task: self.expert(task).eval() for task in self.tasks}

    @torch.no_grad()
    def correct(self, model: nn.Module, task: str, split: str) -> Tensor:
        """Whether each input gets its class: (count,)."""
        batches = self.batches(task, split)
        return torch.cat([self.logits(model, batch, task).argmax(-1) == labels for batch, labels in batches])


class Images(Bench):
    """The image benchmark; its heads are zero-shot, from the frozen text tower."""

    tasks = TASKS
    counts = MappingProxyType({"train": CALIBRATION[-1], "validation": 50, "test": 100})

    def pretrained(self) -> nn.Module:
        return load_pretrained().eval()

    def expert(self, task: str) -> nn.Module:
        return CLIPVisionModel.from_pretrained(self.folder(task), torch_dtype=torch.float32)

    def batches(self, task: str, split: str) -> list[tuple[dict[str, Any], Tensor]]:
        (pixels, labels), count = _images(task, split), self.counts[split]
        pairs = zip(pixels[:count].split(BATCH), labels[:count].split(BATCH), strict=True)
        return [({"pixel_values": x}, y) for x, y in pairs]

    def logits(self, model: nn.Module, batch: Mapping[str, Any], task: str) -> Tensor:
        embeds = _clip().visual_projection(model(**batch).pooler_output)
        return _clip().logit_scale.exp().detach() * F.normalize(embeds, dim=-1) @ _image_head(task).T


class Texts(Bench):
    """The text benchmark; every expert has a head that was trained with it."""

    tasks = text.TASKS
    counts = MappingProxyType({"train": CALIBRATION[-1], "validation": 30, "test": 100})

    def pretrained(self) -> nn.Module:
        return text.load_pretrained().eval()

    def expert(self, task: str) -> nn.Module:
        if self.chosen == "lora":
            return with_adapter(text.load_pretrained(), self.folder(task))
        return BertModel.from_pretrained(self.folder(task), torch_dtype=torch.float32)

    def batches(self, task: str, split: str) -> list[tuple[dict[str, Any], Tensor]]:
        return _text_batches(task, split, self.counts[split])

    def logits(self, model: nn.Module, batch: Mapping[str, Any], task: str) -> Tensor:
        return F.linear(embed(model, batch), *self._head(task))

    @cache  # noqa: B019  # one bench for each seed
    def _head(self, task: str) -> Head:
        return Head.load(self.folder(task) / text.HEAD)


def bench(root: Path, chosen: str, seed: int) -> Bench:
    """The benchmark that has a set of experts: ``gentle``, ``strong``, ``full`` or ``lora``."""
    return (Images if chosen in STRENGTHS else Texts)(root, chosen, seed)


@cache
def _clip() -> CLIPModel:
    return CLIPModel.from_pretrained(DATA / "clip", torch_dtype=torch.float32).eval()


@cache
def _image_head(task: str) -> Tensor:
    return zero_shot_head(_clip(), CLIPProcessor.from_pretrained(DATA / "clip", use_fast=False), task)


@cache
def _images(task: str, split: str) -> tuple[Tensor, Tensor]:
    return measure.arrays(task, split)


@cache
def _text_batches(task: str, split: str, count: int) -> list[tuple[dict[str, Any], Tensor]]:
    texts, labels = arrays(text.load_texts(task, split), task)
    tokenizer = text.load_tokenizer()
    order = list(range(min(count, len(texts))))
    if split != "train":  # of which the first ones are taken
        order.sort(key=lambda i: len(str(texts[i])))  # of about the same length together, so that little is padded
    parts = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    return [(dict(batch_of(tokenizer, [texts[i] for i in part])), labels[part]) for part in parts]
