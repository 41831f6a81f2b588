"""Fine-tune the vision tower on one task; the text tower, and with it the zero-shot head, stays frozen."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor, CLIPVisionModel

from .images import Images
from .pretrain import decay_groups, normalize

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How far a fine-tuning goes."""

    optimizer: str
    lr: float
    steps: int
    batch: int = 64
    weight_decay: float = 0.0


# AdamW moves every weight by about its learning rate a step, whatever the gradient: its task vectors are large and of
# high rank. SGD's stay in the span of the task's own inputs: small, low-rank, and easy to tell apart by a router.
RECIPES = {
    "gentle": Recipe("sgd", lr=0.02, steps=500),
    "strong": Recipe("adamw", lr=3e-4, steps=500, weight_decay=0.01),
}


@torch.no_grad()
def zero_shot_head(model: CLIPModel, processor: CLIPProcessor, task: str) -> Tensor:
    """Normalised text embeddings of the classes, (C, D): the mean over the task's prompts, as the framework does."""
    module = import_module(f"fusion_bench_smile.embedded.tasks.{task}")
    rows = []
    for name in module.classnames:
        texts = processor.tokenizer([t(name) for t in module.templates], return_tensors="pt", padding=True)
        embeds = F.normalize(model.text_projection(model.text_model(**texts).pooler_output), dim=-1)
        rows.append(F.normalize(embeds.mean(0), dim=-1))
    return torch.stack(rows)


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 images (N, 28, 28[, 3]) to normalised pixels (N, 3, 28, 28)."""
    tensor = torch.from_numpy(images).float() / 255
    tensor = tensor[:, None].expand(-1, 3, -1, -1) if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2)
    return normalize(tensor).contiguous()


class Classifier(nn.Module):
    """Vision tower, projection and a fixed zero-shot head: pixels (N, 3, 28, 28) to logits (N, C)."""

    def __init__(self, clip: CLIPModel, vision: nn.Module, head: Tensor) -> None:
        super().__init__()
        self.vision = vision
        self.projection = deepcopy(clip.visual_projection).requires_grad_(False)
        self.register_buffer("head", head)
        self.scale = float(clip.logit_scale.detach().exp())

    def forward(self, pixels: Tensor) -> Tensor:
        pooled = self.vision(pixel_values=pixels).pooler_output
        return self.scale * F.normalize(self.projection(pooled), dim=-1) @ self.head.T


@torch.no_grad()
def accuracy(classifier: Classifier, pixels: Tensor, labels: Tensor, batch: int = 200) -> float:
    classifier.eval()
    right = sum(
        int((classifier(x).argmax(1) == y).sum()) for x, y in zip(pixels.split(batch), labels.split(batch), strict=True)
    )
    return right / len(labels)


def _batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator)[: count - count % size].split(size)


def finetune(
    clip: CLIPModel, vision: CLIPVisionModel, head: Tensor, images: Images, recipe: Recipe, seed: int = 0
) -> CLIPVisionModel:
    """A fine-tuned copy of `vision`; every parameter of it is trained."""
    torch.manual_seed(seed)
    tuned = deepcopy(vision).train()
    classifier = Classifier(clip, tuned, head)
    pixels, labels = to_pixels(images["train"][0]), torch.from_numpy(images["train"][1])
    groups = decay_groups(tuned, recipe.weight_decay)
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(groups, lr=recipe.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / 25, 0.5 * (1 + math.cos(math.pi * s / recipe.steps)))
    )
    batches = _batches(len(labels), recipe.batch, seed)
    for _ in range(recipe.steps):
        index = next(batches)
        shift = torch.randint(-2, 3, (2,)).tolist()
        x = torch.roll(pixels[index], shifts=shift, dims=(2, 3))
        loss = F.cross_entropy(classifier(x), labels[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return tuned.eval()
