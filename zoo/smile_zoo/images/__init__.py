"""The image benchmark: a small CLIP, eight image classification tasks and their experts.

Neither a network nor training is needed. `docs/embedded.md` describes the models and the data;
``python -m recipes.images`` builds them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from fusion_bench.tasks.clip_classification import CLIPTemplateFactory

from fusion_bench_smile.io import lazy_source
from smile_zoo.loading import check_names, read_table, with_adapter

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image
    from torch import Tensor
    from transformers import CLIPVisionModel

DATA = Path(__file__).parent / "data"
TASKS = ("digits", "clothes", "animals", "textures", "planets", "letters", "kana", "flags")

Strength = Literal["gentle"]
Split = Literal["train", "validation", "test"]
STRENGTHS: tuple[Strength, ...] = get_args(Strength)
SPLITS: tuple[Split, ...] = get_args(Split)


def register_tasks() -> None:
    """Register class names and prompt templates of the tasks with the framework, except for names that it knows."""
    known = CLIPTemplateFactory.get_available_datasets()
    for task in (task for task in TASKS if task not in known):
        names = {"module": f"{__name__}.tasks.{task}", "classnames": "classnames", "templates": "templates"}
        # fusion-bench 0.2.33 asserts that the two lists are given, and then ignores them
        CLIPTemplateFactory.register_dataset(task, dataset_info=names, classnames=[], templates=[])


register_tasks()


def load_images(task: str, split: Split = "test") -> Dataset:
    """Load the images of a task.

    Returns:
        A data set with the columns ``image`` (28×28 pixels, mode L or RGB) and ``label`` (class index).

    Raises:
        SmileError: for an unknown task or split.
    """
    check_names(task=(task, TASKS), split=(split, SPLITS))
    return read_table(DATA / "images" / f"{task}-{split}.parquet")


class Pixels:
    """Image transform with the result of the benchmark's CLIP processor, many times faster.

    The images have the model's size already, so only their values change.
    """

    def __call__(self, image: Image) -> Tensor:
        """Normalise one image of 28×28 pixels: (3, 28, 28), float32."""
        import numpy as np

        from smile_zoo.images.evaluate import to_pixels

        return to_pixels(np.asarray(image.convert("RGB"))[None])[0]


def load_pretrained() -> CLIPVisionModel:
    """Load the vision tower of the pretrained CLIP, in float32."""
    import torch
    from transformers import CLIPVisionModel

    return CLIPVisionModel.from_pretrained(DATA / "clip", torch_dtype=torch.float32)


def expert_folder(task: str, strength: Strength = "gentle") -> Path:
    """Folder of an expert's adapter, in PEFT's format.

    Raises:
        SmileError: for an unknown task or strength.
    """
    check_names(task=(task, TASKS), strength=(strength, STRENGTHS))
    return DATA / strength / task


@lazy_source(expert_folder)
def load_expert(task: str, strength: Strength = "gentle") -> CLIPVisionModel:
    """Load the vision tower fine-tuned on one task, in float32: the pretrained tower with the merged adapter.

    Args:
        task: one of `TASKS`.
        strength: ``"gentle"``, with small task vectors.

    Raises:
        SmileError: for an unknown task or strength.
    """
    return with_adapter(load_pretrained(), expert_folder(task, strength))
