"""Leaderboards: the reports of runs as tables, figures and a web page."""

from .boards import OVERRIDES_FILE, Board, Gathered, Run, Skipped, arrange, boards, gather, pareto
from .command import leaderboard, show, write
from .figures import family, rank_grid, rank_heatmaps, scatter, task_bars
from .published import Published, published_for
from .tables import csv, latex, markdown, page, rich_table

__all__ = [
    "OVERRIDES_FILE", "Board", "Gathered", "Published", "Run", "Skipped", "arrange", "boards", "csv", "family",
    "gather", "latex", "leaderboard", "markdown", "page", "pareto", "published_for", "rank_grid", "rank_heatmaps",
    "rich_table", "scatter", "show", "task_bars", "write",
]  # fmt: skip
