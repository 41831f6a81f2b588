"""Leaderboards: reports of runs as tables, pictures and a web page."""

from .boards import Board, arrange, boards, pareto
from .command import leaderboard, write
from .gather import Run, Skipped, gather

__all__ = ["Board", "Run", "Skipped", "arrange", "boards", "gather", "leaderboard", "pareto", "write"]
