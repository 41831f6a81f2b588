"""Repositories of a Hugging Face cache: models and data sets under their names on the hub, without a hub.

With `HF_HOME` and `HF_HUB_OFFLINE=1`, huggingface_hub, transformers and datasets read them as downloads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset, DatasetInfo
from datasets.arrow_writer import ArrowWriter
from datasets.splits import SplitDict, SplitInfo


class Cache:
    """The folder `HF_HOME`."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def add_model(self, name: str) -> Path:
        """The folder of a new model, which the caller fills."""
        commit = hashlib.sha1(name.encode()).hexdigest()
        folder = self.home / "hub" / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(commit)
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        return snapshot

    def model(self, name: str) -> Path:
        """The folder of a model that was added."""
        (snapshot,) = (self.home / "hub" / f"models--{name.replace('/', '--')}" / "snapshots").iterdir()
        return snapshot

    def add_data_set(self, name: str, config: str, splits: Mapping[str, Dataset]) -> None:
        """Add a configuration of a data set as `load_dataset` leaves it after a download."""
        short = name.rpartition("/")[2]
        folder = self.home / "datasets" / name.replace("/", "___") / config / "0.0.0" / hashlib.sha1(b"").hexdigest()
        folder.mkdir(parents=True)
        sizes = SplitDict(dataset_name=short)
        for split, data in splits.items():
            with ArrowWriter(path=str(folder / f"{short}-{split}.arrow"), features=data.features) as writer:
                writer.write_table(data.data.table.combine_chunks())
                writer.finalize()
            sizes.add(SplitInfo(name=split, num_examples=len(data), dataset_name=short))
        features = next(iter(splits.values())).features
        info = DatasetInfo(
            features=features, splits=sizes, builder_name="parquet", dataset_name=short, config_name=config,
            version="0.0.0",
        )  # fmt: skip
        info.write_to_directory(str(folder))
