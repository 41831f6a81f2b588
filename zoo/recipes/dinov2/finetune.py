"""Linear probes and full fine-tuning of the backbone."""

from __future__ import annotations

import itertools
import math
from copy import deepcopy

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F
from transformers import Dinov2Model

from recipes.common.training import shuffled_batches
from smile_zoo.dinov2.task_pool import features
from smile_zoo.heads import Head

LEARNING_RATE, STEPS, BATCH_SIZE, WARM_UP = 3e-5, 150, 32, 10
FROZEN = "embeddings."  # patch, class and position embeddings; SMILE keeps them pretrained


def linear_probe(model: Dinov2Model, pixels: Tensor, labels: Tensor) -> Head:
    """Fit a logistic regression on the features of a model.

    Args:
        model: the pretrained backbone.
        pixels: images, (N, 3, 56, 56).
        labels: their classes, (N,).

    Returns:
        A head of weight (C, 2·D) and bias (C,).
    """
    with torch.inference_mode():
        inputs = torch.cat([features(model, batch) for batch in pixels.split(100)])
    mean, scale = inputs.mean(0), inputs.std(0).clamp(min=1e-6)
    fitted = LogisticRegression(C=0.01, max_iter=500).fit(((inputs - mean) / scale).numpy(), labels.numpy())
    weight = torch.from_numpy(fitted.coef_).float() / scale  # of the features as they are
    return Head(weight, torch.from_numpy(fitted.intercept_).float() - weight @ mean)


def finetune(pretrained: Dinov2Model, head: Head, pixels: Tensor, labels: Tensor, seed: int = 0) -> Dinov2Model:
    """Fine-tune a copy of the backbone with a fixed head; all parameters but the embeddings are trained.

    Args:
        pretrained: the backbone; it is not changed.
        head: the linear probe of the task.
        pixels: training images, (N, 3, 56, 56).
        labels: their classes, (N,).
        seed: of the batches.
    """
    torch.manual_seed(seed)
    tuned = deepcopy(pretrained).train()
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad_(not name.startswith(FROZEN))
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP, 0.5 * (1 + math.cos(math.pi * step / STEPS)))
    )
    for index in itertools.islice(shuffled_batches(len(labels), BATCH_SIZE, seed), STEPS):
        with torch.autocast("cpu", torch.bfloat16):
            embedded = features(tuned, pixels[index])
        loss = F.cross_entropy(F.linear(embedded.float(), *head), labels[index])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    return tuned.eval().requires_grad_(True)
