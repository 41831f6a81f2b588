"""Helpers that the three benchmarks share: validated names, parquet tables, models with a merged adapter."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fusion_bench_smile.exceptions import SmileError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound="PreTrainedModel")


def check_names(**arguments: tuple[str, Collection[str]]) -> None:
    """Validate names against the known ones.

    Args:
        arguments: for each kind of name the given one and the known ones, e.g. ``task=("novels", TASKS)``.

    Raises:
        SmileError: for the first unknown name; the message lists the known ones.
    """
    for kind, (name, known) in arguments.items():
        if name not in known:
            raise SmileError(f"no {kind} {name!r}; the {kind}s are {', '.join(known)}")


def read_table(file: Path) -> Dataset:
    """Read a parquet file as a data set, without a copy in the cache of the datasets library."""
    import pyarrow.parquet as pq
    from datasets import Dataset

    return Dataset(pq.read_table(file))


def check_columns(task: str, dataset: Dataset, *columns: str) -> None:
    """Validate the data set of a task.

    Raises:
        SmileError: if a column is missing, or the data set is empty.
    """
    missing = set(columns) - set(dataset.column_names)
    if missing:
        raise SmileError(f"the data set of {task} has no column {sorted(missing)[0]!r}")
    if not len(dataset):
        raise SmileError(f"the data set of {task} is empty")


def with_adapter(pretrained: Model, folder: Path) -> Model:
    """Merge an adapter into a model, in place.

    Args:
        pretrained: the base model of the adapter.
        folder: the adapter in PEFT's format.

    Returns:
        The model itself; all of its parameters require gradients.
    """
    from peft import PeftModel

    merged = PeftModel.from_pretrained(pretrained, str(folder)).merge_and_unload()
    return merged.requires_grad_(True)  # PEFT freezes the base model; Fisher merging needs its gradients
