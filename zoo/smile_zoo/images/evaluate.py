"""Zero-shot classification of pixel arrays without the framework, for the recipe and the studies."""

from __future__ import annotations

from copy import deepcopy
from importlib import import_module

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor

MEAN, STD = 0.5, 0.25


def normalize(images: Tensor) -> Tensor:
    """Normalise pixels in [0, 1] with the mean and standard deviation of the benchmark's image processor."""
    return (images - MEAN) / STD


def to_pixels(images: np.ndarray) -> Tensor:
    """Convert uint8 images (N, 28, 28[, 3]) to normalised pixels (N, 3, 28, 28), float32."""
    tensor = torch.tensor(images).float() / 255
    tensor = tensor[:, None].expand(-1, 3, -1, -1) if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2)
    return normalize(tensor).contiguous()


@torch.no_grad()
def zero_shot_head(model: CLIPModel, processor: CLIPProcessor, task: str) -> Tensor:
    """Compute the zero-shot classifier of a task, as the framework does.

    Returns:
        Normalised text embeddings of the C classes, each the mean over the prompts: (C, D), float32.
    """
    module, tokenizer = import_module(f"smile_zoo.images.tasks.{task}"), processor.tokenizer  # type: ignore[attr-defined]
    rows = []
    for name in module.classnames:
        texts = tokenizer([t(name) for t in module.templates], return_tensors="pt", padding=True)
        embeds = F.normalize(model.text_projection(model.text_model(**texts).pooler_output), dim=-1)
        rows.append(F.normalize(embeds.mean(0), dim=-1))
    return torch.stack(rows)


class Classifier(nn.Module):
    """Vision tower with projection and a fixed zero-shot head.

    Args:
        clip: the model whose visual projection and logit scale are used; the projection is copied and frozen.
        vision: the vision tower, shared.
        head: text embeddings of the classes, (C, D).
    """

    head: Tensor

    def __init__(self, clip: CLIPModel, vision: nn.Module, head: Tensor) -> None:
        super().__init__()
        self.vision = vision
        self.projection = deepcopy(clip.visual_projection).requires_grad_(False)
        self.register_buffer("head", head)
        self.scale = float(clip.logit_scale.detach().exp())

    def forward(self, pixels: Tensor) -> Tensor:
        """Classify pixels (N, 3, 28, 28): logits (N, C)."""
        pooled = self.vision(pixel_values=pixels).pooler_output
        return self.scale * F.normalize(self.projection(pooled), dim=-1) @ self.head.T


@torch.no_grad()
def accuracy(classifier: Classifier, pixels: Tensor, labels: Tensor, batch_size: int = 200) -> float:
    """Top-1 accuracy, between 0 and 1, on pixels (N, 3, 28, 28) with labels (N,)."""
    classifier.eval()
    batches = zip(pixels.split(batch_size), labels.split(batch_size), strict=True)
    return sum(int((classifier(x).argmax(1) == y).sum()) for x, y in batches) / len(labels)
