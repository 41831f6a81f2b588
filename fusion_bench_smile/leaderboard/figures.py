"""Boards as figures: scores against parameters, heat maps over ranks, and the scores of single tasks."""

import re
from collections.abc import Sequence
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..reports import STYLES, figure_text, grouped_bars, heatmap, panels
from .boards import COLUMNS, Board, pareto

TICKS = (1, 1.25, 1.5, 2, 4, 8, 16, 32)  # parameter ratios
BARS, TASKS = 6, 60  # methods and tasks in `task_bars`
PANELS, LEGEND = 12, 40  # boards and entries of the legend in `scatter`
LARGEST = 1e9  # larger numbers are not drawn: they would leave no room for the others
LEADING_FAMILIES = ("SMILE", "SMILE of the framework", "individual", "pretrained")  # in legends


def family(method: str) -> str:
    """The label of a method without its options: ``TIES (λ=0.3)`` → ``TIES``."""
    return re.sub(r" \(.*\)", "", method)


def family_styles(boards: Sequence[Board]) -> dict[str, tuple[str, str]]:
    """Family of measured methods → colour and marker, the same in all figures of these boards."""
    families = {family(name) for board in boards for name in board.measured["method"]}
    leading = [name for name in LEADING_FAMILIES if name in families]
    return dict(zip([*leading, *sorted(families.difference(leading))], cycle(STYLES)))


def drawable(board: Board) -> pd.DataFrame:
    """The measured rows of a board, with numbers beyond `LARGEST` missing."""
    table, numbers = board.measured.copy(), [*board.tasks, *COLUMNS]
    table[numbers] = table[numbers].where(table[numbers].abs() < LARGEST)
    return table


def score_column(board: Board) -> str:
    """The score in the figures of a board: ``retention`` where it is known, otherwise ``average``."""
    return "retention" if drawable(board)["retention"].notna().any() else "average"


def scatter(boards: Sequence[Board]) -> Figure:
    """Retention (or the average) against the parameter ratio, with the Pareto front.

    There is one panel for each board, for at most `PANELS` boards. The legend has at most `LEGEND` families of methods.
    """
    boards = boards[:PANELS]
    styles = family_styles(boards)
    figure, axes = panels(1.5 + 5 * len(boards), 5.2, 1, len(boards), squeeze=False)
    for axis, board in zip(axes.flat, boards, strict=True):
        _scatter_panel(axis, board, score_column(board), styles)
    legends = [axis.get_legend_handles_labels() for axis in axes.flat]
    handles = {label: handle for legend in legends for handle, label in zip(*legend, strict=True)}
    columns, shown = min(4, 2 * len(boards)), list(handles)[:LEGEND]
    figure.legend([handles[label] for label in shown], shown, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def has_ratios(board: Board) -> bool:
    """Whether a measured run has both a parameter ratio and a score, which `scatter` needs."""
    return bool(drawable(board)[["parameters", score_column(board)]].notna().all(axis=1).any())


def rank_grid(board: Board, value: str = "average") -> pd.DataFrame:
    """A column of the measured SMILE runs over ``k`` (index) and ``gate_k`` (columns); empty without two of each."""
    table = drawable(board)
    table = table[table["method"].map(family) == "SMILE"].dropna(subset=["gate_k", "k", value])
    grid = table.pivot_table(index="k", columns="gate_k", values=value, aggfunc="max")
    return grid if min(grid.shape) > 1 else grid.iloc[:0, :0]


def rank_heatmaps(board: Board) -> Figure:
    """Average and parameter ratio of SMILE over k and gate_k, where there is a grid of them."""
    titles = {"average": "average score (%)", "parameters": "parameters, relative to the pretrained model"}
    grids = {column: grid for column in titles if not (grid := rank_grid(board, column)).empty}
    figure, axes = panels(5.5 * len(grids), 4.2, 1, len(grids), squeeze=False)
    for axis, (column, grid) in zip(axes.flat, grids.items(), strict=True):
        template = "{:.2f}×" if column == "parameters" else "{:.1f}"
        bright = grid >= np.nanmean([np.nanmin(grid), np.nanmax(grid)])
        figure.colorbar(heatmap(axis, grid, template, bright, origin="lower"), ax=axis)
        axis.set_xticks(range(len(grid.columns)), [f"{value:g}" for value in grid.columns])
        axis.set_yticks(range(len(grid.index)), [f"{value:g}" for value in grid.index])
        axis.set(xlabel="gate_k (rank of the router)", ylabel="k (rank of the experts)", title=titles[column])
    figure.suptitle(f"SMILE on {figure_text(board.benchmark)}")
    return figure


def task_bars(board: Board) -> Figure:
    """The score on each task of the best method of each family, for at most `BARS` families and `TASKS` tasks."""
    styles, tasks = family_styles([board]), board.tasks[:TASKS]
    measured = drawable(board).sort_values("average", ascending=False)
    best = measured[~measured["method"].map(family).duplicated()].head(BARS)
    figure, axis = panels(max(8, 1.5 * len(tasks)), 4.4)
    scores = best.set_index("method")[tasks].T.astype(float)
    grouped_bars(axis, scores, [styles[family(method)][0] for method in scores.columns])
    axis.set(ylabel="score (%)", title=figure_text(board.benchmark))
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _scatter_panel(axis: Axes, board: Board, score: str, styles: dict[str, tuple[str, str]]) -> None:
    table = drawable(board).dropna(subset=["parameters", score])
    for name, rows in table.groupby(table["method"].map(family), sort=False):
        color, marker = styles[name]
        label = figure_text(name)
        axis.scatter(
            rows["parameters"], rows[score], s=60, color=color, marker=marker, label=label, zorder=3, alpha=0.9
        )
    front = table[pareto(table, score=score)].sort_values("parameters")
    axis.plot(front["parameters"], front[score], color="0.55", lw=1, ls="--", zorder=2, label="Pareto front")
    published = board.published_smile
    if len(published):
        axis.scatter(
            published["parameters"], published[score], s=18, facecolors="none", edgecolors="0.6", zorder=2,
            label="SMILE, published †",
        )  # fmt: skip
    if score == "retention":
        axis.axhline(100, color="0.8", linewidth=1, zorder=1)
    axis.set_xscale("log", base=2)
    ratios = pd.concat([table["parameters"], published.get("parameters", pd.Series(dtype=float))])
    low, high = ratios.min(), ratios.max()
    ticks = [tick for tick in TICKS if low * 0.9 <= tick <= high * 1.1]
    axis.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axis.minorticks_off()
    axis.set(xlabel="parameters, relative to the pretrained model", title=figure_text(board.benchmark))
    axis.set_ylabel("retention (% of the individual models)" if score == "retention" else "average score (%)")
    axis.grid(alpha=0.3)
