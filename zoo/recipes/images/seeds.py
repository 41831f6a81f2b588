"""Fine-tune the experts of a benchmark with several seeds, for studies of the variance between fine-tunings.

python -m recipes.images.seeds FOLDER --benchmark images   # needs the extra recipes, and package registries
python -m recipes.images.seeds FOLDER --benchmark text     # needs the extras recipes and text
python -m recipes.images.seeds FOLDER --benchmark dinov2   # needs the extras recipes and dinov2, and package registries

The hyperparameters are those of the zoo's experts. The models are saved in full rank:
FOLDER/experts/<set>/<seed>/<task>. Existing folders are skipped. The LoRA experts of the first seed are copies of the
zoo's.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import CLIPModel, CLIPProcessor

from recipes.dinov2 import build as dinov2_build
from recipes.images.build import fetch_tasks, fine_tuned, vision_tower
from recipes.text.build import fine_tuned as fine_tuned_text
from smile_zoo import dinov2, text
from smile_zoo.images import DATA, STRENGTHS, TASKS
from smile_zoo.images.evaluate import zero_shot_head

SEEDS = (0, 1, 2)
log = logging.getLogger(__name__)


def folder_of(root: Path, expert_set: str, seed: int, task: str) -> Path:
    """Folder of an expert of a set: ``gentle``, ``full``, ``lora`` or ``dinov2``."""
    return root / "experts" / expert_set / str(seed) / task


def images(root: Path, seeds: Sequence[int]) -> None:
    """Fine-tune the image experts from the zoo's CLIP, on the whole training splits of the tasks."""
    tasks = fetch_tasks(root)
    clip = CLIPModel.from_pretrained(DATA / "clip", torch_dtype=torch.float32).eval()
    processor = CLIPProcessor.from_pretrained(DATA / "clip", use_fast=False)
    tower = vision_tower(clip)
    heads = {task: zero_shot_head(clip, processor, task) for task in TASKS}
    for seed in seeds:
        for strength in STRENGTHS:
            for task in TASKS:
                folder = folder_of(root, strength, seed, task)
                fine_tuned(clip, tower, heads[task], tasks[task], strength, folder, seed)
                log.info("%s", folder)


def texts(root: Path, seeds: Sequence[int]) -> None:
    """Fine-tune the text experts and their heads on the zoo's training texts."""
    encoder = text.load_pretrained().eval()
    for seed in seeds:
        for kind in text.KINDS:
            for task in text.TASKS:
                folder = folder_of(root, kind, seed, task)
                if kind == "lora" and seed == 0 and not folder.exists():
                    shutil.copytree(text.expert_folder(task, kind), folder)
                fine_tuned_text(encoder, task, kind, folder, seed)
                log.info("%s", folder)


def dinov2_images(root: Path, seeds: Sequence[int]) -> None:
    """Fine-tune the experts of the DINOv2 benchmark with the zoo's heads, on the whole training splits of the tasks."""
    tasks, pretrained = dinov2_build.fetch_tasks(root), dinov2.load_pretrained().eval()
    for seed in seeds:
        for task in dinov2.TASKS:
            folder = folder_of(root, "dinov2", seed, task)
            dinov2_build.fine_tuned(pretrained, dinov2.load_head(task), tasks[task], folder, seed)
            log.info("%s", folder)


BENCHMARKS = {"images": images, "text": texts, "dinov2": dinov2_images}


def main() -> None:
    """Fine-tune the experts that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="working folder")
    parser.add_argument("--benchmark", choices=BENCHMARKS, default="images", help="(default: images)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    BENCHMARKS[arguments.benchmark](arguments.folder, arguments.seeds)


if __name__ == "__main__":
    main()
