"""Command line of a recipe."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

import pandas as pd


def run(build: Callable[[Path], pd.DataFrame], description: str | None, size: str) -> pd.DataFrame:
    """Build in the folder of the command line; print the results and write them to ``experts.csv`` there.

    Args:
        build: builds below a folder and returns one row of accuracies per expert.
        description: of the command, for its help.
        size: disk usage of the working folder, for the help.

    Returns:
        What `build` returned.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=Path, help=f"working folder; {size}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    results = build(folder)
    results.round(2).to_csv(folder / "experts.csv", index=False)
    print(results.round(1).to_string(index=False))
    return results
