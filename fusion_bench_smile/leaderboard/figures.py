"""Boards as figures: scores against parameters, heat maps over ranks, and the scores of single tasks."""

import re
from collections.abc import Sequence
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..reports import STYLES, grouped_bars, heatmap, panels
from .boards import Board, pareto

TICKS = (1, 1.25, 1.5, 2, 4, 8, 16, 32)  # parameter ratios
BARS = 6  # methods in `task_bars`
LEADING_FAMILIES = ("SMILE", "SMILE of the framework", "individual", "pretrained")  # in legends


def family(method: str) -> str:
    """The label of a method without its options: ``TIES (λ=0.3)`` → ``TIES``."""
    return re.sub(r" \(.*\)", "", method)


def family_styles(boards: Sequence[Board]) -> dict[str, tuple[str, str]]:
    """Family of measured methods → colour and marker, the same in all figures of these boards."""
    families = {family(name) for board in boards for name in board.measured["method"]}
    leading = [name for name in LEADING_FAMILIES if name in families]
    return dict(zip([*leading, *sorted(families.difference(leading))], cycle(STYLES)))


def score_column(board: Board) -> str:
    """The score in the figures of a board: ``retention`` where it is known, otherwise ``average``."""
    return "retention" if board.measured["retention"].notna().any() else "average"


def scatter(boards: Sequence[Board]) -> Figure:
    """Retention (or the average) against the parameter ratio, with the Pareto front: one panel for each board."""
    styles = family_styles(boards)
    figure, axes = panels(1.5 + 5 * len(boards), 5.2, 1, len(boards), squeeze=False)
    for axis, board in zip(axes.flat, boards, strict=True):
        _scatter_panel(axis, board, score_column(board), styles)
    legends = [axis.get_legend_handles_labels() for axis in axes.flat]
    handles = {label: handle for legend in legends for handle, label in zip(*legend, strict=True)}
    columns = min(4, 2 * len(boards))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
    return figure


def has_ratios(board: Board) -> bool:
    """Whether a measured run has both a parameter ratio and a score, which `scatter` needs."""
    return bool(board.measured[["parameters", score_column(board)]].notna().all(axis=1).any())


def rank_grid(board: Board, value: str = "average") -> pd.DataFrame:
    """A column of the measured SMILE runs over ``k`` (index) and ``gate_k`` (columns); empty without two of each."""
    table = board.measured[board.measured["method"].map(family) == "SMILE"].dropna(subset=["gate_k", "k", value])
    grid = table.pivot_table(index="k", columns="gate_k", values=value, aggfunc="max")
    return grid if min(grid.shape) > 1 else grid.iloc[:0, :0]


def rank_heatmaps(board: Board) -> Figure:
    """Average and parameter ratio of SMILE over k and gate_k."""
    titles = {"average": "average score (%)", "parameters": "parameters, relative to the pretrained model"}
    figure, axes = panels(11, 4.2, 1, len(titles))
    for axis, (column, title) in zip(axes, titles.items(), strict=True):
        grid = rank_grid(board, column)
        template = "{:.2f}×" if column == "parameters" else "{:.1f}"
        bright = grid >= np.nanmean([np.nanmin(grid), np.nanmax(grid)])
        figure.colorbar(heatmap(axis, grid, template, bright, origin="lower"), ax=axis)
        axis.set_xticks(range(len(grid.columns)), [f"{value:g}" for value in grid.columns])
        axis.set_yticks(range(len(grid.index)), [f"{value:g}" for value in grid.index])
        axis.set(xlabel="gate_k (rank of the router)", ylabel="k (rank of the experts)", title=title)
    figure.suptitle(f"SMILE on {board.benchmark}")
    return figure


def task_bars(board: Board) -> Figure:
    """The score on each task of the best method of each family, for at most `BARS` families."""
    styles = family_styles([board])
    measured = board.measured.sort_values("average", ascending=False)
    best = measured[~measured["method"].map(family).duplicated()].head(BARS)
    figure, axis = panels(max(8, 1.5 * len(board.tasks)), 4.4)
    scores = best.set_index("method")[board.tasks].T.astype(float)
    grouped_bars(axis, scores, [styles[family(method)][0] for method in scores.columns])
    axis.set(ylabel="score (%)", title=board.benchmark)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _scatter_panel(axis: Axes, board: Board, score: str, styles: dict[str, tuple[str, str]]) -> None:
    table = board.measured.dropna(subset=["parameters", score])
    for name, rows in table.groupby(table["method"].map(family), sort=False):
        color, marker = styles[name]
        axis.scatter(rows["parameters"], rows[score], s=60, color=color, marker=marker, label=name, zorder=3, alpha=0.9)
    front = table[pareto(table, score=score)].sort_values("parameters")
    axis.plot(front["parameters"], front[score], color="0.55", lw=1, ls="--", zorder=2, label="Pareto front")
    if score == "retention":
        axis.axhline(100, color="0.8", linewidth=1, zorder=1)
    axis.set_xscale("log", base=2)
    low, high = table["parameters"].min(), table["parameters"].max()
    ticks = [tick for tick in TICKS if low * 0.9 <= tick <= high * 1.1]
    axis.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axis.minorticks_off()
    axis.set(xlabel="parameters, relative to the pretrained model", title=board.benchmark)
    axis.set_ylabel("retention (% of the individual models)" if score == "retention" else "average score (%)")
    axis.grid(alpha=0.3)
