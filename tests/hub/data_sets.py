"""Small data sets with the columns and classes of those on the hub: eight image tasks and GLUE."""

from __future__ import annotations

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from fusion_bench.tasks.clip_classification import get_classnames
from hub.repositories import Cache
from PIL import Image as Picture

from smile_zoo.tiny_t5 import load_sentences

# task of the framework → data set and configuration on the hub
IMAGE_SETS = {
    "sun397": ("tanganke/sun397", "default"), "stanford-cars": ("tanganke/stanford_cars", "default"),
    "resisc45": ("tanganke/resisc45", "default"), "eurosat": ("tanganke/eurosat", "default"),
    "svhn": ("svhn", "cropped_digits"), "gtsrb": ("tanganke/gtsrb", "default"), "mnist": ("mnist", "mnist"),
    "dtd": ("tanganke/dtd", "default"),
}  # fmt: skip
GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
TRAINING_EXAMPLES, TEST_EXAMPLES = 16, 9


def add_images(cache: Cache) -> None:
    """Add the data sets of the eight image tasks."""
    for number, (task, (name, config)) in enumerate(IMAGE_SETS.items()):
        train, test = (_images(task, count, number) for count in (TRAINING_EXAMPLES, TEST_EXAMPLES))
        cache.add_data_set(name, config, {"train": train, "test": test})


def add_glue(cache: Cache) -> None:
    """Add GLUE under both names by which the framework loads it."""
    for task in GLUE:
        train = load_sentences(task, "train").select(range(TRAINING_EXAMPLES))
        validation = load_sentences(task, "validation").select(range(TEST_EXAMPLES))
        held_out = ["validation_matched", "validation_mismatched"] if task == "mnli" else ["validation"]
        for name in ("nyu-mll/glue", "glue"):
            cache.add_data_set(name, task, {"train": train, **dict.fromkeys(held_out, validation)})


def _images(task: str, count: int, seed: int) -> Dataset:
    """Coloured noise, whose mean depends on the class; MNIST is grey."""
    names = _distinct(get_classnames(task))
    generator = np.random.default_rng([seed, count])
    labels = generator.integers(0, len(names), count)
    colours = np.random.default_rng(seed).integers(0, 200, (len(names), 1, 1, 3))
    pixels = colours[labels] + generator.integers(0, 56, (count, 28, 28, 3))
    pictures = [Picture.fromarray(each.astype(np.uint8)) for each in pixels]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    images = [picture.convert("L") if task == "mnist" else picture for picture in pictures]
    return Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features)


def _distinct(names: list[str]) -> list[str]:
    """Names of classes, with a number where one repeats another."""
    return [str(name) if name not in names[:i] else f"{name} {i}" for i, name in enumerate(names)]
