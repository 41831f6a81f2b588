"""The steps of the recipe: download, draw, fine-tune, export."""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import Dinov2Model

from recipes.common.adapters import extract_adapter, save_adapter
from recipes.common.packages import cached
from recipes.dinov2.finetune import finetune, linear_probe
from recipes.dinov2.tasks import SMALL
from recipes.dinov2.tasks import build as build_images
from recipes.images.build import fetch_packages
from recipes.images.export import export_images
from recipes.images.tasks import Images, Split
from smile_zoo.dinov2 import DATA, HEAD, TASKS, expert_folder, load_head, load_pretrained
from smile_zoo.dinov2.task_pool import features, to_pixels
from smile_zoo.heads import Head
from smile_zoo.loading import with_adapter
from smile_zoo.quantized_adapters import write_quantized

log = logging.getLogger(__name__)

RANK = 32  # of the adapters
NORMS = ["norm1", "norm2", "layernorm"]


def pixels_of(split: Split) -> tuple[Tensor, Tensor]:
    """Images and labels of a split as tensors: (N, 3, 56, 56), float32, and (N,), int64."""
    images, labels = split
    return to_pixels([Image.fromarray(image) for image in images]), torch.from_numpy(labels.astype(np.int64))


def accuracy(model: Dinov2Model, head: Head, pixels: Tensor, labels: Tensor) -> float:
    """Accuracy in percent of a backbone with a head on N images."""
    with torch.inference_mode():
        predicted = torch.cat([F.linear(features(model, batch), *head).argmax(dim=-1) for batch in pixels.split(100)])
    return 100 * (predicted == labels).float().mean().item()


def fine_tuned(pretrained: Dinov2Model, head: Head, images: Images, folder: Path, seed: int = 0) -> Dinov2Model:
    """Fine-tune the backbone on one task and save it to `folder`, or load it from there."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        finetune(pretrained, head, *pixels_of(images["train"]), seed).save_pretrained(folder.with_suffix(".part"))
        folder.with_suffix(".part").rename(folder)
    return Dinov2Model.from_pretrained(folder).eval()


def fetch_tasks(root: Path) -> dict[str, Images]:
    """Download the packages below `root` and draw the images of all tasks, or read them from there."""
    return cached(root / "dinov2-tasks.pkl", lambda: build_images(fetch_packages(root)))


def build(root: Path) -> pd.DataFrame:
    """Build the benchmark below `root` and export it to the data folder of `smile_zoo.dinov2`.

    Returns:
        Accuracy in percent of each expert on its task: of the pretrained model with the linear probe, of the full
        fine-tune, of the adapter as it is distributed.
    """
    tasks = fetch_tasks(root)
    return pd.DataFrame([_build_expert(root, tasks[task], task) for task in TASKS])


def _build_expert(root: Path, images: Images, task: str) -> dict[str, object]:
    started = time.perf_counter()
    pretrained, folder = load_pretrained().eval(), DATA / "experts" / task
    if task not in SMALL:
        export_images(images, task, DATA / "images", lossless=False)
    if not (folder / HEAD).exists():
        folder.mkdir(parents=True, exist_ok=True)
        probe = linear_probe(pretrained, *pixels_of(images["train"]))
        Head(probe.weight.half(), probe.bias.half()).save(folder / HEAD)
    head = load_head(task)  # as it is distributed
    tuned = fine_tuned(pretrained, head, images, root / "experts" / "dinov2" / "0" / task)
    _export_adapter(pretrained, tuned, task)
    models = {"pretrained": pretrained, "fine-tuned": tuned}
    models["adapter"] = with_adapter(load_pretrained(), expert_folder(task)).eval()
    accuracies = {name: accuracy(model, head, *pixels_of(images["test"])) for name, model in models.items()}
    row = {"task": task, **accuracies, "seconds": time.perf_counter() - started}
    log.info("%s", row)
    return row


def _export_adapter(pretrained: Dinov2Model, tuned: Dinov2Model, task: str) -> None:
    """Write the adapter of a fine-tune in four bits; the head beside it stays."""
    folder = DATA / "experts" / task
    linear = [name for name, module in pretrained.named_modules() if isinstance(module, torch.nn.Linear)]
    with tempfile.TemporaryDirectory() as scratch:
        save_adapter(extract_adapter(pretrained, tuned, RANK, linear, NORMS), Path(scratch) / "adapter")
        head = (folder / HEAD).read_bytes()
        write_quantized(Path(scratch) / "adapter", folder)
        (folder / HEAD).write_bytes(head)
