"""Measure one set of experts, seed by seed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from ...report import write_whole
from ...store import FactorStore
from ..build.seeds import SEEDS
from .benches import Bench, bench
from .choices import choices
from .finding import of_scores
from .rows import of_merged, of_variants
from .unknown import of_held_out
from .variants import RATIOS, Ranks

log = logging.getLogger(__name__)


def measure(root: Path, chosen: str) -> None:
    """Measure one set of experts; each seed's tables are files below ``root/beyond``. What is there is kept."""
    folder = root / "beyond"
    folder.mkdir(exist_ok=True)
    store = FactorStore(root / "store")
    settings = folder / f"{chosen}-choices.json"
    if not settings.exists():
        write_whole(settings, json.dumps(choices(bench(root, chosen, SEEDS[0]), store), indent=1))
    found = json.loads(settings.read_text())
    paper, ours = ([Ranks(**values) for values in found[name]] for name in ("paper", "ours"))
    tables: dict[str, Callable[[Bench], Iterator[dict[str, Any]]]] = {
        "rows": lambda at: of_variants(at, paper, ours, store),
        "merged": lambda at: of_merged(at, found["scaling"]),
        "ideas": lambda at: of_scores(at, ours[RATIOS.index(1.25)], store),
        "unknown": lambda at: of_held_out(at, ours[RATIOS.index(1.5)], store),
    }
    for name, seed in product(tables, SEEDS):
        file = folder / f"{chosen}-{seed}-{name}.csv"
        if not file.exists():
            rows = list(tables[name](bench(root, chosen, seed)))
            write_whole(file, pd.DataFrame(rows).assign(set=chosen, seed=seed).to_csv(index=False))
            log.info("%s", file)
