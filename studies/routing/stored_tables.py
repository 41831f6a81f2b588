"""The stored tables of measurements, ``<set>-<seed>-<name>.csv`` in ``FOLDER/routing``.

``studies/README.md`` describes their columns.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

EXPERT_SETS = ("gentle", "strong", "full", "lora")


def tables_folder(root: Path) -> Path:
    """The folder of the tables below the folder that the command line names."""
    return root / "routing"


def read_tables(folder: Path, expert_set: str, name: str) -> pd.DataFrame:
    """The tables of all seeds in one; empty if there are none.

    Args:
        folder: Folder of the tables.
        expert_set: Set of experts.
        name: ``rows``, ``merged``, ``ideas`` or ``unknown``.
    """
    files = sorted(folder.glob(f"{expert_set}-[0-9]*-{name}.csv"))
    return pd.concat(map(pd.read_csv, files)) if files else pd.DataFrame()


def read_accuracies(folder: Path, expert_set: str) -> pd.DataFrame:
    """The rows of all variants, and of merging methods if they were measured for all seeds."""
    rows, merged = read_tables(folder, expert_set, "rows"), read_tables(folder, expert_set, "merged")
    is_complete = len(merged) and set(merged["seed"]) == set(rows["seed"])
    return pd.concat([rows, merged]) if is_complete else rows


def pack_bits(flags: Tensor) -> str:
    """Flags (N,) as hexadecimal digits, one bit for each, with zeros at the end up to whole bytes."""
    return np.packbits(flags.cpu().numpy().astype(bool)).tobytes().hex()


def unpack_bits(packed: str) -> np.ndarray:
    """The flags of `pack_bits`, with its zeros at the end: uint8."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(packed), dtype=np.uint8))
