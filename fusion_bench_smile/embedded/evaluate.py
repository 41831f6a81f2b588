"""Zero-shot classification on arrays, without the framework: for building and measuring the benchmark itself."""

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
    """Images in [0, 1] to what the image processor of the benchmark makes of them."""
    return (images - MEAN) / STD


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 images (N, 28, 28[, 3]) to normalised pixels (N, 3, 28, 28)."""
    tensor = torch.tensor(images).float() / 255
    tensor = tensor[:, None].expand(-1, 3, -1, -1) if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2)
    return normalize(tensor).contiguous()


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
    """The share of images whose highest logit is their label's."""
    classifier.eval()
    pairs = zip(pixels.split(batch), labels.split(batch), strict=True)
    return sum(int((classifier(x).argmax(1) == y).sum()) for x, y in pairs) / len(labels)
