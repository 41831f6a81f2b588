"""The embedded benchmark: a small CLIP, eight image tasks and their experts, shipped with the package.

No network and no training is needed to use it; `docs/embedded.md` says what it is made of, and
``python -m fusion_bench_smile.embedded.build`` makes it anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fusion_bench.tasks.clip_classification import CLIPTemplateFactory

from .shipped import check_names, read_table, with_adapter

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image
    from torch import Tensor
    from transformers import CLIPVisionModel

DATA = Path(__file__).parent / "data"
TASKS = ("digits", "clothes", "animals", "textures", "planets", "letters", "kana", "flags")
STRENGTHS = ("gentle", "strong")
SPLITS = ("train", "validation", "test")

Strength = Literal["gentle", "strong"]
Split = Literal["train", "validation", "test"]

for _task in TASKS:  # the framework looks class names and prompts up by the task's name
    CLIPTemplateFactory._dataset_mapping.setdefault(_task, f"{__name__}.tasks.{_task}")


def load_images(task: str, split: Split = "test") -> Dataset:
    """The images of a task: columns ``image`` (28x28, mode L or RGB) and ``label`` (class number).

    Raises:
        SmileError: for an unknown task or split.
    """
    check_names(task=(task, TASKS), split=(split, SPLITS))
    return read_table(DATA / "images" / f"{task}-{split}.parquet")


class Pixels:
    """Turns an image of the benchmark into what its CLIP processor makes of it, many times faster: (3, 28, 28) float32.

    The images have the model's size already, so that only their values change.
    """

    def __call__(self, image: Image) -> Tensor:
        import numpy as np

        from .evaluate import to_pixels

        return to_pixels(np.asarray(image.convert("RGB"))[None])[0]


def load_pretrained() -> CLIPVisionModel:
    """The vision tower of the pretrained CLIP, in float32."""
    import torch
    from transformers import CLIPVisionModel

    return CLIPVisionModel.from_pretrained(DATA / "clip", torch_dtype=torch.float32)


def expert_folder(task: str, strength: Strength = "gentle") -> Path:
    """The folder with the adapter of one expert.

    Raises:
        SmileError: for an unknown task or strength.
    """
    check_names(task=(task, TASKS), strength=(strength, STRENGTHS))
    return DATA / strength / task


def load_expert(task: str, strength: Strength = "gentle") -> CLIPVisionModel:
    """The vision tower fine-tuned on one task: the pretrained one with that task's adapter merged into it.

    Args:
        strength: how far the fine-tuning went: ``"gentle"`` (small task vectors) or ``"strong"``.

    Raises:
        SmileError: for an unknown task or strength.
    """
    return with_adapter(load_pretrained(), expert_folder(task, strength))
