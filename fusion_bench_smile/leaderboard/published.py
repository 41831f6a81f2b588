"""Published results, shown as reference rows beside the measured ones."""

from collections.abc import Collection
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from omegaconf import OmegaConf

FOLDER = Path(__file__).parent / "published"
OPTIONS = ("gate_k", "k", "top_k")  # of SMILE, columns of boards


class Published(NamedTuple):
    """Published results on one benchmark."""

    title: str  # name of the benchmark
    table: pd.DataFrame  # other methods than SMILE × task: scores in percent, and their ``average``, as published
    individual: str | None  # the row of the table with the individual models; None without one
    source: str  # citation of the publication
    # the same of SMILE, with its `OPTIONS`, ``parameters`` relative to the pretrained model, and ``default`` for tables
    smile: pd.DataFrame
    note: str  # on the published results of SMILE


@cache
def sources() -> dict[str, Any]:
    """The metadata of all published results: titles, model pools and citations (``published/sources.yaml``)."""
    return OmegaConf.to_container(OmegaConf.load(FOLDER / "sources.yaml"))  # type: ignore[return-value]


def load(name: str) -> Published:
    """Load the published results ``published/{name}.csv`` and ``published/smile_{name}.csv``, e.g. clip_vit_b32_ta8."""
    metadata, benchmark = sources(), sources()["benchmarks"][name]
    smile = _load_smile(name, benchmark)
    file = FOLDER / f"{name}.csv"
    scores = [column for column in smile if column not in (*OPTIONS, "parameters", "default")]
    table = pd.read_csv(file, index_col="method") if file.exists() else pd.DataFrame(columns=scores)
    individual = metadata["individual"] if file.exists() else None
    return Published(benchmark["title"], table, individual, metadata["source"], smile, metadata["smile"])


def projection_merging(modelpool: str, tasks: Collection[str]) -> pd.DataFrame:
    """The published scores (model × task, in percent) of experts whose task vectors are projected onto one zone.

    The rows are those of `analysis.ZONES`, with the pretrained and the fine-tuned models; empty for other model pools.
    """
    file = FOLDER / f"projection_merging_{_benchmark_of(modelpool)}.csv"
    table = pd.read_csv(file, index_col="model") if file.exists() else pd.DataFrame()
    return table if set(table.columns) == {*tasks, "average"} else pd.DataFrame()


def _load_smile(name: str, benchmark: dict[str, Any]) -> pd.DataFrame:
    """Published results of SMILE, with the parameter ratio of the framework's layout; empty without any."""
    file = FOLDER / f"smile_{name}.csv"
    if not file.exists():
        return pd.DataFrame()
    table = pd.read_csv(file)
    table["parameters"] = table.pop("num_params") / benchmark["pretrained_parameters"]
    ranks = [(row.gate_k, row.k, row.top_k) for row in table.itertuples()]
    table["default"] = [list(rank) in [[*pair, 1] for pair in benchmark["default"]] for rank in ranks]
    models = [f", {model}" for model in table.pop("model")] if "model" in table else [""] * len(table)
    table.index = pd.Index([_label(*rank) + model for rank, model in zip(ranks, models, strict=True)], name="method")
    return table


def _label(gate_k: int, k: int, top_k: int) -> str:
    more = "" if top_k == 1 else f", top_k={top_k}"
    return f"SMILE (gate_k={gate_k}, k={'dense' if k == -1 else k}{more})"


def published_for(modelpool: str, tasks: Collection[str]) -> Published | None:
    """The published results for a model pool's configuration; None unless they have exactly these tasks."""
    name = _benchmark_of(modelpool)
    results = None if name is None else load(name)
    return results if results and set(results.table.columns) == {*tasks, "average"} else None


def _benchmark_of(modelpool: str) -> str | None:
    """The first benchmark that has a model pool's configuration; None without one."""
    benchmarks = sources()["benchmarks"].items()
    return next((n for n, each in benchmarks if any(fnmatch(modelpool, p) for p in each["modelpools"])), None)
