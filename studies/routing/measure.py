"""Measurement of one set of experts, seed by seed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from fusion_bench_smile import FactorCache
from fusion_bench_smile.io import write_atomically
from studies.routing.benchmarks import SEEDS, Benchmark, load_benchmark
from studies.routing.expert_identification import score_rows
from studies.routing.model_selection import select_options
from studies.routing.out_of_distribution import held_out_rows
from studies.routing.stored_tables import tables_folder
from studies.routing.variant_accuracy import merging_rows, variant_rows
from studies.routing.variants import BUDGETS, RankOptions

log = logging.getLogger(__name__)


def measure(root: Path, expert_set: str) -> None:
    """Measure a set of experts. Existing tables in ``root/routing`` are kept.

    Args:
        root: Folder of the experts.
        expert_set: Set of experts.
    """
    folder, factor_cache = tables_folder(root), FactorCache(root / "factor_cache")
    folder.mkdir(exist_ok=True)
    file = folder / f"{expert_set}-choices.json"
    if not file.exists():
        options = select_options(load_benchmark(root, expert_set, SEEDS[0]), factor_cache)
        write_atomically(file, json.dumps(options, indent=1))
    options = json.loads(file.read_text())
    paper, two_pass = ([RankOptions(**values) for values in options[name]] for name in ("paper", "ours"))
    tables: dict[str, Callable[[Benchmark], Iterator[dict[str, Any]]]] = {
        "rows": lambda benchmark: variant_rows(benchmark, paper, two_pass, factor_cache),
        "merged": lambda benchmark: merging_rows(benchmark, options["scaling"]),
        "ideas": lambda benchmark: score_rows(benchmark, two_pass[BUDGETS.index(1.25)], factor_cache),
        "unknown": lambda benchmark: held_out_rows(benchmark, two_pass[BUDGETS.index(1.5)], factor_cache),
    }
    for name, seed in product(tables, SEEDS):
        file = folder / f"{expert_set}-{seed}-{name}.csv"
        if not file.exists():
            rows = list(tables[name](load_benchmark(root, expert_set, seed)))
            write_atomically(file, pd.DataFrame(rows).assign(set=expert_set, seed=seed).to_csv(index=False))
            log.info("%s", file)
