"""The command of a recipe."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

import pandas as pd


def run(build: Callable[[Path], pd.DataFrame], description: str | None, size: str) -> pd.DataFrame:
    """Build in the folder that the command line names; what each expert reaches is printed and kept as a table.

    Args:
        size: of the working folder, for the help.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=Path, help=f"working folder; {size}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    table = build(folder)
    table.round(2).to_csv(folder / "experts.csv", index=False)
    print(table.round(1).to_string(index=False))
    return table
