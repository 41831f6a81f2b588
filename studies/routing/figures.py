"""The figures of the study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fusion_bench_smile.reports import STYLES
from studies.routing.labels import TITLES, label_of
from studies.routing.stored_tables import read_tables
from studies.routing.summary import ORACLE, ORACLE_WITH_NORMS
from studies.routing.variants import BUDGETS, CALIBRATED, CALIBRATED_INT8, PAPER, TWO_PASS, VARIANTS, ZERO_SHOT

CURVES = [PAPER.name, TWO_PASS.name, ZERO_SHOT.name, CALIBRATED.name, ORACLE, ORACLE_WITH_NORMS]
LEVELS = {"AdaMerging": ":", "TIES": "-.", "Task Arithmetic": "--", "pretrained": "-"}


def retention_figure(summaries: Mapping[str, pd.DataFrame]) -> Figure:
    """Retention against the parameter ratio, one panel for each set; hollow markers are at the byte ratio of int8.

    Args:
        summaries: Set of experts → summary.
    """
    columns = min(2, len(summaries))
    rows = -(-len(summaries) // columns)
    figure = Figure(figsize=(6.2 * columns, 4.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, (expert_set, summary) in zip(axes.flat, summaries.items(), strict=False):
        _retention_panel(axis, summary)
        axis.set(title=TITLES[expert_set], xlabel="parameters (hollow: bytes), relative to the pretrained model")
        axis.set_ylabel("retention (% of the individual models)")
    for axis in axes.flat[len(summaries) :]:
        axis.set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _retention_panel(axis: Axes, summary: pd.DataFrame) -> None:
    for name, (color, marker) in zip(CURVES, STYLES, strict=False):
        curve = summary[summary["variant"] == name].sort_values("ratio")
        line = "--" if name in (ORACLE, ORACLE_WITH_NORMS) else "-"
        axis.plot(curve["ratio"], curve["retention"], line, color=color, marker=marker, label=label_of(name), zorder=3)
        axis.fill_between(curve["ratio"], curve["low"], curve["high"], color=color, alpha=0.12, linewidth=0)
    int8, (color, marker) = CALIBRATED_INT8.name, STYLES[CURVES.index(CALIBRATED.name)]
    points = summary[summary["variant"] == int8]
    axis.scatter(points["bytes"], points["retention"], s=45, facecolors="none", edgecolors=color, marker=marker,
                 label=f"{label_of(int8)} (bytes)", zorder=4)  # fmt: skip
    for name, line in LEVELS.items():
        level = summary.loc[summary["variant"] == name, "retention"]
        if len(level):
            axis.axhline(level.iloc[0], color="0.6", linestyle=line, linewidth=1, label=name, zorder=1)
    largest = summary.loc[summary["budget"].notna(), "ratio"].max() + 0.05  # small ranks cannot spend large budgets
    ticks = [ratio for ratio in BUDGETS if ratio <= largest]
    axis.set_xticks(ticks, [f"{ratio:g}×" for ratio in ticks])
    axis.grid(alpha=0.3)


def layer_figure(folder: Path, expert_sets: Sequence[str], budget: float) -> Figure:
    """Router accuracy of every variant in each layer, one panel for each set.

    Args:
        folder: Folder of the stored tables.
        expert_sets: Sets of experts.
        budget: The budget.
    """
    figure = Figure(figsize=(12, 3.4 * len(expert_sets)), layout="constrained")
    axes = figure.subplots(len(expert_sets), 1, squeeze=False)[:, 0]
    names = [variant.name for variant in VARIANTS]
    for axis, expert_set in zip(axes, expert_sets, strict=True):
        rows = read_tables(folder, expert_set, "rows")
        rows = rows[(rows["budget"] == budget) & rows["variant"].isin(names)]
        accuracies = {name: _layer_accuracies(group) for name, group in rows.groupby("variant", sort=False)}
        width = max(len(values) for values in accuracies.values())
        grid = np.stack([np.broadcast_to(values, width) for values in accuracies.values()])
        image = axis.imshow(grid, aspect="auto", cmap="cividis", vmin=0, vmax=100)
        axis.set_yticks(range(len(accuracies)), [label_of(str(name)) for name in accuracies], fontsize=6)
        axis.set(title=TITLES[expert_set], xlabel="routed layer, in the order of the model")
        figure.colorbar(image, ax=axis, label="router accuracy (%)")
    return figure


def _layer_accuracies(group: pd.DataFrame) -> np.ndarray:
    """The mean over seeds for each layer; one value for variants with one choice for all layers."""
    if group["layers"].isna().any():
        return np.array([group["right"].mean()])
    return np.mean([[float(value) for value in values.split()] for values in group["layers"]], axis=0)
