"""The steps of the recipe: download, render, pretrain, fine-tune, export."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pandas as pd
import torch
from transformers import CLIPModel, CLIPProcessor, CLIPVisionModel

from recipes.common.adapters import extract_adapter, save_adapter
from recipes.common.packages import cached, fetch
from recipes.images.corpus import build_corpus
from recipes.images.export import export_clip, export_images
from recipes.images.finetune import FINE_TUNINGS, finetune
from recipes.images.pretrain import pretrain
from recipes.images.sources import DEBIAN, KANA_FONTS, LATIN_FONTS, NPM, PYPI
from recipes.images.tasks import Images, build_tasks
from smile_zoo.images import DATA, STRENGTHS, TASKS
from smile_zoo.images.evaluate import Classifier, accuracy, to_pixels, zero_shot_head

log = logging.getLogger(__name__)

RANK = 16  # of the adapters
NORMS = ["pre_layrnorm", "post_layernorm", "layer_norm1", "layer_norm2"]


def vision_tower(clip: CLIPModel) -> CLIPVisionModel:
    """Copy the vision tower of a CLIP model, with eager attention, which is the fastest for 17 tokens."""
    tower = CLIPVisionModel._from_config(clip.config.vision_config, attn_implementation="eager")
    tower.vision_model.load_state_dict(clip.vision_model.state_dict())
    return tower.eval()


def fetch_tasks(root: Path) -> dict[str, Images]:
    """Download the packages below `root` and build the tasks, or read both from there."""
    return cached(root / "tasks.pkl", lambda: build_tasks(fetch_packages(root)))


def fetch_packages(root: Path) -> Path:
    """Download and unpack all packages of the recipe; see `fetch`."""
    return fetch(root, [*DEBIAN, *LATIN_FONTS, *KANA_FONTS], NPM, PYPI)


def fine_tuned(
    clip: CLIPModel,
    tower: CLIPVisionModel,
    head: torch.Tensor,
    images: Images,
    strength: str,
    folder: Path,
    seed: int = 0,
) -> CLIPVisionModel:
    """Fine-tune a vision tower on one task and save it to `folder`, or load it from there."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        tuned = finetune(clip, tower, head, images, FINE_TUNINGS[strength], seed)
        tuned.save_pretrained(folder.with_suffix(".part"))
        folder.with_suffix(".part").rename(folder)
    return CLIPVisionModel.from_pretrained(folder).eval()


def build(root: Path) -> pd.DataFrame:
    """Build the benchmark below `root` and export it to the data folder of `smile_zoo.images`.

    Returns:
        Accuracy in percent of each expert on its task: of the pretrained model, of the full fine-tune, of the adapter.
    """
    packages, tasks = fetch_packages(root), fetch_tasks(root)
    if not (root / "pretrained" / "model.safetensors").exists():
        pretrain(cached(root / "corpus.pkl", lambda: build_corpus(packages)), root / "pretrained")
    clip = CLIPModel.from_pretrained(root / "pretrained").eval()
    processor = CLIPProcessor.from_pretrained(root / "pretrained", use_fast=False)
    export_clip(clip, processor, DATA / "clip")
    # fine-tuning starts from the exported weights, which are rounded to float16
    clip = CLIPModel.from_pretrained(DATA / "clip", torch_dtype=torch.float32).eval()
    rows = []
    for task in TASKS:
        export_images(tasks[task], task, DATA / "images")
        rows += [_build_expert(root, clip, processor, tasks[task], task, strength) for strength in STRENGTHS]
    return pd.DataFrame(rows)


def _build_expert(
    root: Path, clip: CLIPModel, processor: CLIPProcessor, images: Images, task: str, strength: str
) -> dict[str, object]:
    started = time.perf_counter()
    tower, head = vision_tower(clip), zero_shot_head(clip, processor, task)
    linear = [name for name, module in tower.named_modules() if isinstance(module, torch.nn.Linear)]
    tuned = fine_tuned(clip, tower, head, images, strength, root / strength / task)
    adapter = extract_adapter(tower, tuned, RANK, linear, NORMS)
    save_adapter(adapter, DATA / strength / task)
    models = {"pretrained": tower, "fine-tuned": tuned, "adapter": adapter.merge_and_unload()}
    pixels, labels = to_pixels(images["test"][0]), torch.from_numpy(images["test"][1])
    accuracies = {name: 100 * accuracy(Classifier(clip, model, head), pixels, labels) for name, model in models.items()}
    row = {"task": task, "strength": strength, **accuracies, "seconds": time.perf_counter() - started}
    log.info("%s", row)
    return row
