"""Published results beside the measured ones: reference rows, never mixed with them."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from omegaconf import OmegaConf

FOLDER = Path(__file__).parent / "published"


class Published(NamedTuple):
    """Published results on one benchmark.

    Attributes:
        table: method → score of each task in percent, and their ``average``, as published.
        individual: the method that is the individual models.
        source: where they were published.
        smile: what is published about SMILE.
    """

    title: str
    table: pd.DataFrame
    individual: str
    source: str
    smile: str


@cache
def sources() -> dict[str, Any]:
    """What is known of the files: titles, model pools, source."""
    return OmegaConf.to_container(OmegaConf.load(FOLDER / "sources.yaml"))  # type: ignore[return-value]


def load(name: str) -> Published:
    """The published results in the file of that name, e.g. ``clip_vit_b32_ta8``."""
    of = sources()
    table = pd.read_csv(FOLDER / f"{name}.csv", index_col="method")
    return Published(of["benchmarks"][name]["title"], table, of["individual"], of["source"], of["smile"])


def published_for(modelpool: str, tasks: Collection[str]) -> Published | None:
    """The published results on a model pool's benchmark, if its tasks are those that were measured."""
    for name, benchmark in sources()["benchmarks"].items():
        if any(fnmatch(modelpool, pattern) for pattern in benchmark["modelpools"]):
            found = load(name)
            return found if set(found.table.columns) == {*tasks, "average"} else None
    return None
