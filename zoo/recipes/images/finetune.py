"""Fine-tuning of the vision tower on one task, with a frozen text tower and therefore a frozen zero-shot head."""

from __future__ import annotations

import itertools
import math
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPVisionModel

from recipes.common.training import shuffled_batches
from recipes.images.pretrain import decay_groups
from recipes.images.tasks import Images
from smile_zoo.images.evaluate import Classifier, to_pixels


@dataclass(frozen=True)
class FineTuning:
    """Hyperparameters of a fine-tuning.

    Attributes:
        optimizer: ``"sgd"`` (momentum 0.9) or ``"adamw"``.
        lr: largest learning rate.
        steps: number of optimizer steps.
        batch_size: images per step.
        weight_decay: of the matrices.
    """

    optimizer: str
    lr: float
    steps: int
    batch_size: int = 48
    weight_decay: float = 0.0


# Patch, class and position embeddings are frozen: SMILE routes linear layers and keeps all others pretrained.
FROZEN = "vision_model.embeddings."
# The task vectors of SGD stay in the span of the inputs: small, of low rank, and easy to route.
FINE_TUNINGS = {"gentle": FineTuning("sgd", lr=0.03, steps=300)}


def finetune(
    clip: CLIPModel, vision: CLIPVisionModel, head: Tensor, images: Images, settings: FineTuning, seed: int = 0
) -> CLIPVisionModel:
    """Fine-tune a copy of a vision tower; all of its parameters but the embeddings are trained.

    Args:
        clip: the model that the tower is from.
        vision: the pretrained vision tower; it is not changed.
        head: zero-shot classifier of the task, (C, D).
        images: splits of the task; the training split is used.
        settings: hyperparameters.
        seed: of the batches and the random shifts.
    """
    torch.manual_seed(seed)
    tuned = deepcopy(vision).train()
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad_(not name.startswith(FROZEN))
    classifier = Classifier(clip, tuned, head)
    pixels, labels = to_pixels(images["train"][0]), torch.from_numpy(images["train"][1])
    optimizer = _optimizer(tuned, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / 25, 0.5 * (1 + math.cos(math.pi * s / settings.steps)))
    )
    for index in itertools.islice(shuffled_batches(len(labels), settings.batch_size, seed), settings.steps):
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


def _optimizer(model: nn.Module, settings: FineTuning) -> torch.optim.Optimizer:
    groups = decay_groups(model, settings.weight_decay)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=settings.lr)
