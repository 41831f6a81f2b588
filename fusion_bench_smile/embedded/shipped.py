"""What the embedded benchmarks have in common: names that are checked, tables, adapters."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..ending import one_clear_line
from ..errors import SmileError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound="PreTrainedModel")


@one_clear_line()
def check_names(**chosen: tuple[str, Collection[str]]) -> None:
    """Refuse a name that isn't among the known ones, e.g. ``task=("novels", TASKS)``.

    Raises:
        SmileError: naming it, and the known ones.
    """
    for kind, (name, known) in chosen.items():
        if name not in known:
            raise SmileError(f"no {kind} {name!r}; the {kind}s are {', '.join(known)}")


def read_table(file: Path) -> Dataset:
    """A data set from the parquet file that holds it."""
    import pyarrow.parquet as pq
    from datasets import Dataset

    return Dataset(pq.read_table(file))


def with_adapter(pretrained: Model, folder: Path) -> Model:
    """The model with an adapter merged into it."""
    from peft import PeftModel

    merged = PeftModel.from_pretrained(pretrained, str(folder)).merge_and_unload()
    return merged.requires_grad_(True)  # which PEFT has frozen, and Fisher merging needs
