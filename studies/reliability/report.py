"""The table of a campaign."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from textwrap import fill

import pandas as pd

from fusion_bench_smile.reports import markdown_table
from studies.reliability.outcomes import KINDS
from studies.reliability.runner import Row

PACKAGES = ("torch", "transformers", "peft", "safetensors")


def table(rows: Sequence[Row]) -> str:
    """Counts of each kind of attempts, and their sums, as a Markdown table."""
    frame = pd.DataFrame([{"part": row.part, "attempts": row.trial, "tried": row.tried, **row.counts} for row in rows])
    sums = {"part": "**all**", "attempts": "", **frame[["tried", *KINDS]].sum()}
    return markdown_table(pd.concat([frame, pd.DataFrame([sums])]), digits=0)


def others(rows: Sequence[Row]) -> list[str]:
    """Name and description of every attempt that ended otherwise."""
    return [name for row in rows for name in row.others]


def page(rows: Sequence[Row], command: str, seed: int, seconds: float) -> str:
    """The page in ``docs/``."""
    versions = ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)])
    origin = (
        f"Written by `{command}` in {seconds / 60:.0f} minutes, with seed {seed}, {versions} on {platform.system()}. "
        "[reliability.md](reliability.md) says what is tried, and what the columns mean."
    )
    text = fill(origin, 120, break_long_words=False, break_on_hyphens=False)
    lines = ["# Measurements of reliability", "", text, "", table(rows), ""]
    if found := others(rows):
        lines += ["Attempts that ended otherwise:", "", *(f"- `{name}`" for name in found), ""]
    return "\n".join(lines)
