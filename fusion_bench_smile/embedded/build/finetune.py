"""Fine-tune the vision tower on one task; the text tower, and with it the zero-shot head, stays frozen."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPVisionModel

from ..evaluate import Classifier, to_pixels
from .images import Images
from .pretrain import decay_groups

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How far a fine-tuning goes."""

    optimizer: str
    lr: float
    steps: int
    batch: int = 48
    weight_decay: float = 0.0


# The patch, class and position embeddings stay as they are: SMILE routes linear layers and keeps the rest pretrained.
STEM = "vision_model.embeddings."
# AdamW moves every weight by about its learning rate a step, whatever the gradient: its task vectors are large and of
# high rank. SGD's stay in the span of the task's own inputs: small, low-rank, and easy to tell apart by a router.
RECIPES = {
    "gentle": Recipe("sgd", lr=0.03, steps=300),
    "strong": Recipe("adamw", lr=5e-4, steps=300, weight_decay=0.01),
}


def _batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator)[: count - count % size].split(size)


def finetune(
    clip: CLIPModel, vision: CLIPVisionModel, head: Tensor, images: Images, recipe: Recipe, seed: int = 0
) -> CLIPVisionModel:
    """A fine-tuned copy of `vision`; every parameter of it is trained but the stem's."""
    torch.manual_seed(seed)
    tuned = deepcopy(vision).train()
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad_(not name.startswith(STEM))
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
        with torch.autocast("cpu", torch.bfloat16):
            logits = classifier(x)
        loss = F.cross_entropy(logits.float(), labels[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return tuned.requires_grad_(True).eval()
