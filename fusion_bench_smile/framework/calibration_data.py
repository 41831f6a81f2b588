"""Unlabelled calibration inputs from the training sets of a model pool."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from fusion_bench.modelpool.base_pool import BaseModelPool
from torch import Tensor

from ..exceptions import PlanError

BATCH_SIZE = 32
# input of a model → what goes with it
INPUTS = {"pixel_values": (), "input_ids": ("attention_mask", "token_type_ids")}

ModelInputs = dict[str, Tensor]


def calibration_inputs(pool: BaseModelPool, experts: Sequence[str], count: int) -> dict[str, list[ModelInputs]]:
    """Unlabelled inputs of each expert's training set, for `calibrate`: expert → batches of keyword arguments.

    The same `count` examples are drawn in every run. An example has what the model takes (``pixel_values``,
    ``input_ids``), or an image in a pool with a processor.

    Raises:
        PlanError: naming the expert without training set, or with examples of an unknown form.
    """
    return {expert: _draw(pool, expert, count) for expert in experts}


def model_inputs(pool: BaseModelPool, example: Any, expert: str) -> ModelInputs:
    """One training example as keyword arguments of the model, with a batch dimension of 1 and without its label.

    An example is a mapping, or a pair of image and label. The pool's processor prepares images.

    Raises:
        PlanError: if the example has no known input; the message names the expert.
    """
    values = example if isinstance(example, Mapping) else dict(zip(("image", "label"), example, strict=False))
    for name, masks in INPUTS.items():
        if name in values:
            return {key: torch.as_tensor(values[key])[None] for key in (name, *masks) if key in values}
    if "image" in values and hasattr(pool, "load_processor"):
        return dict(pool.load_processor()(images=values["image"], return_tensors="pt"))
    raise PlanError(
        f"calibration: the training examples of {expert!r} have {', '.join(map(str, values))}; one of "
        f"{', '.join(INPUTS)}, or an image in a pool with a processor is needed"
    )


def _draw(pool: BaseModelPool, expert: str, count: int) -> list[ModelInputs]:
    """The inputs of one expert, in batches."""
    if expert not in (getattr(pool, "_train_datasets", None) or {}):
        raise PlanError(
            f"calibration={count} needs train_datasets.{expert} in the model pool, from which it draws inputs; add it, "
            "or use calibration=0"
        )
    dataset: Any = pool.load_train_dataset(expert)
    numbers = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count].tolist()
    return list(_batches([model_inputs(pool, dataset[number], expert) for number in numbers]))


def _batches(examples: Sequence[ModelInputs]) -> Iterator[ModelInputs]:
    """Batches of neighbours with the same names and shapes, which need no padding."""
    for _, group in groupby(examples, lambda example: [(name, value.shape) for name, value in example.items()]):
        alike = list(group)
        for start in range(0, len(alike), BATCH_SIZE):
            batch = alike[start : start + BATCH_SIZE]
            yield {name: torch.cat([example[name] for example in batch]) for name in batch[0]}
