"""Published results, shown as reference rows beside the measured ones."""

from collections.abc import Collection
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from omegaconf import OmegaConf

FOLDER = Path(__file__).parent / "published"


class Published(NamedTuple):
    """Published results on one benchmark."""

    title: str  # name of the benchmark
    table: pd.DataFrame  # method × task: scores in percent, and their ``average``, as published
    individual: str  # the row of the table with the individual models
    source: str  # citation of the publication
    smile: str  # note on the published results of SMILE


@cache
def sources() -> dict[str, Any]:
    """The metadata of all published results: titles, model pools and citations (``published/sources.yaml``)."""
    return OmegaConf.to_container(OmegaConf.load(FOLDER / "sources.yaml"))  # type: ignore[return-value]


def load(name: str) -> Published:
    """Load the published results ``published/{name}.csv``, e.g. ``clip_vit_b32_ta8``."""
    metadata = sources()
    title, table = metadata["benchmarks"][name]["title"], pd.read_csv(FOLDER / f"{name}.csv", index_col="method")
    return Published(title, table, metadata["individual"], metadata["source"], metadata["smile"])


def published_for(modelpool: str, tasks: Collection[str]) -> Published | None:
    """The published results for a model pool's configuration; None unless they have exactly these tasks."""
    for name, benchmark in sources()["benchmarks"].items():
        if any(fnmatch(modelpool, pattern) for pattern in benchmark["modelpools"]):
            results = load(name)
            return results if set(results.table.columns) == {*tasks, "average"} else None
    return None
