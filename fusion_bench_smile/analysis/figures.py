"""Figures of the studies, from the tables that the functions of the same names in `analysis` return."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FormatStrFormatter, MaxNLocator
from torch import Tensor

from ..reports import STYLES, figure_text, grouped_bars, heatmap, panels
from .task_vectors import ZONES

COLORS = [color for color, _ in STYLES]
LAYER_AXIS = "linear layer, in model order"
MEASURES = {
    "construction": "construction (s)", "construction_memory": "construction memory (MB)",
    "parameters": "parameters (×)", "flops": "FLOPs (×)",
    "forward": "forward time (×)", "forward_memory": "forward memory (MB)",
}  # fmt: skip
VARIABLES = {"experts": "number of experts T", "k": "rank k", "gate_k": "router rank gate_k"}


def subspace_energy(table: pd.DataFrame) -> Figure:
    """Mean energy share of each zone, by layer and by type of layer."""
    figure, (by_layer, by_type) = panels(11, 4.2, 1, 2, sharey=True)
    zones = list(ZONES)
    energy = 100 * table.groupby("layer", sort=False)[zones].mean()
    _curves(by_layer, energy.set_axis(range(1, len(energy) + 1)).add_prefix("zone "), markersize=4)
    by_layer.set(xlabel=LAYER_AXIS, ylabel="share of ‖ΔW‖² (%)", ylim=(0, 100))
    grouped_bars(by_type, 100 * table.groupby("type", sort=False)[zones].mean(), COLORS)
    by_type.set(xlabel="type of layer")
    figure.legend(*by_layer.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def explained_variance(variance: pd.DataFrame) -> Figure:
    """Mean share of ‖ΔW‖² that a rank keeps, by type of layer."""
    figure, axis = panels(7, 4.2)
    last = 2 * variance[variance["explained"] < 0.999]["rank"].max()  # the curves are flat beyond
    types = variance[variance["rank"] <= last].groupby("type", sort=False)
    _curves(axis, {name: 100 * rows.groupby("rank")["explained"].mean() for name, rows in types}, markersize=3)
    for target in (90, 95, 99):
        axis.axhline(target, color="0.8", linewidth=1, zorder=0)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(FormatStrFormatter("%d"))
    axis.set(xlabel="rank", ylabel="share of ‖ΔW‖² kept (%)", ylim=(0, 102))
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    return figure


def score_bars(table: pd.DataFrame, ylabel: str = "score (%)") -> Figure:
    """One group of bars for each column of a table, with one bar for each row."""
    figure, axis = panels(max(8, 1.4 * len(table.columns)), 4.4)
    grouped_bars(axis, table.T, COLORS)
    axis.set_ylabel(ylabel)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    return figure


def confusion(matrix: pd.DataFrame) -> Figure:
    """The confusion matrix of the routers, task × expert, in percent of the task's tokens."""
    figure, axis = panels(1.6 + 0.75 * len(matrix.columns), 1.4 + 0.62 * len(matrix))
    image = heatmap(axis, 100 * matrix, "{:.0f}", 100 * matrix > 50 * matrix.to_numpy().max(), vmin=0)
    axis.set_xticks(range(len(matrix.columns)), map(figure_text, matrix.columns), rotation=45, ha="right")
    axis.set_yticks(range(len(matrix)), map(figure_text, matrix.index))
    axis.set(xlabel="selected expert", ylabel="task of the input")
    figure.colorbar(image, ax=axis, label="share of the task's tokens (%)")
    return figure


def layer_curves(accuracy: pd.Series, load: pd.DataFrame, entropy: pd.Series) -> Figure:
    """Router accuracy, load of the busiest expert (of a table layer × expert), and relative entropy, from 0 to 1."""
    figure, axis = panels(8, 4.2)
    curves = {
        "router accuracy": accuracy, "load of the busiest expert": load.max(axis=1),
        "entropy of the router's softmax (100 %: uniform)": entropy,
    }  # fmt: skip
    percent = 100 * pd.DataFrame(curves).loc[accuracy.index]
    _curves(axis, percent.set_axis(range(1, len(percent) + 1)), markersize=4)
    chance = 100 / len(load.columns)
    axis.axhline(chance, color="0.6", linewidth=1, linestyle="--", label=f"chance ({chance:.3g} %)")
    axis.set(xlabel=LAYER_AXIS, ylabel="%", ylim=(0, 105))
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def token_maps(images: Tensor, choices: dict[str, Tensor], experts: Sequence[str], titles: Sequence[str]) -> Figure:
    """The expert of each image patch as a colour: one row for each image, one column for each layer.

    The images are (n, channels, H, W), of any range. The choices are layer → indices of experts, (n, patches) in
    row-major order, for square images.
    """
    rows, columns = len(images), 1 + len(choices)
    figure, axes = panels(1.9 * columns, 1.75 * rows + 1, rows, columns, squeeze=False)
    colors = ListedColormap([COLORS[number % len(COLORS)] for number in range(len(experts))])
    for axis, image, title in zip(axes[:, 0], images, titles, strict=True):
        low, high = image.min(), image.max()
        axis.imshow(((image - low) / (high - low)).permute(1, 2, 0).cpu())
        axis.set_ylabel(figure_text(title))
    for column, (layer, experts_of_patches) in zip(axes[:, 1:].T, choices.items(), strict=True):
        side = math.isqrt(experts_of_patches.shape[1])
        for axis, patches in zip(column, experts_of_patches.cpu(), strict=True):
            axis.imshow(patches.reshape(side, side), cmap=colors, vmin=-0.5, vmax=len(experts) - 0.5)
        column[0].set_title(figure_text(layer), fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    handles = [Patch(color=colors(number), label=figure_text(name)) for number, name in enumerate(experts)]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, title="selected expert")
    return figure


def error_accumulation(table: pd.DataFrame) -> Figure:
    """Mean relative error of the hidden states, by block."""
    figure, axis = panels(7, 4.2)
    models = table.groupby("model", sort=False)
    _curves(axis, {name: 100 * rows.groupby("block")["error"].mean() for name, rows in models})
    axis.set(xlabel="block", ylabel="‖h − h₀‖ / ‖h₀‖ (%)", ylim=(0, None))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure


def ablations(table: pd.DataFrame) -> Figure:
    """The column ``average`` (in percent) of each variant, as horizontal bars."""
    figure, axis = panels(8, 0.6 + 0.32 * len(table))
    averages = table["average"][::-1]
    axis.barh(range(len(averages)), averages, color=COLORS[0])
    axis.set_yticks(range(len(averages)), map(figure_text, averages.index))
    for position, value in enumerate(averages):
        axis.text(value - 0.5, position, f"{value:.1f}", va="center", ha="right", color="w", fontsize=8)
    axis.set(xlabel="average score (%)")
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    return figure


def costs(table: pd.DataFrame) -> Figure:
    """All measured costs over T, k and gate_k, one row of panels for each; the others are those of the first point."""
    figure, axes = panels(15, 7, len(VARIABLES), len(MEASURES), sharey="col")
    reference = table.iloc[0][list(VARIABLES)]
    for row, (variable, xlabel), (color, marker) in zip(axes, VARIABLES.items(), STYLES, strict=False):
        fixed = [name for name in VARIABLES if name != variable]
        points = table[(table[fixed] == reference[fixed]).all(axis=1)].sort_values(variable)
        for axis, (measure, title) in zip(row, MEASURES.items(), strict=True):
            axis.plot(points[variable], points[measure], color=color, marker=marker)
            axis.set(xlabel=xlabel, ylim=(1 if "×" in title else 0, 1.06 * table[measure].max()))
            axis.grid(alpha=0.3)
    for axis, title in zip(axes[0], MEASURES.values(), strict=True):
        axis.set_title(title)
    figure.suptitle("×: relative to the pretrained model")
    return figure


def _curves(axis: Axes, curves: Mapping[str, pd.Series] | pd.DataFrame, **options: Any) -> None:
    """Draw each series over its index, with its name as the label."""
    for (name, values), (color, marker) in zip(curves.items(), STYLES, strict=False):
        axis.plot(values.index, values, color=color, marker=marker, label=figure_text(name), **options)
