"""The studies as pictures."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from ..leaderboard.figures import STYLES, grouped_bars
from .subspace import ZONES

COLORS = [color for color, _ in STYLES]
MARKERS = [marker for _, marker in STYLES]


def subspace_energy(table: pd.DataFrame) -> Figure:
    """Mean share of each zone by layer, and by type of layer."""
    figure, (by_layer, by_type) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for zone, color, marker in zip(ZONES, COLORS, MARKERS, strict=False):
        values = 100 * table.groupby("layer", sort=False)[zone].mean()
        by_layer.plot(range(1, len(values) + 1), values, color=color, marker=marker, markersize=4, label=f"zone {zone}")
    by_layer.set(xlabel="linear layer, in the model's order", ylabel="share of ‖ΔW‖² (%)", ylim=(0, 100))
    shares = 100 * table.groupby("type", sort=False)[list(ZONES)].mean()
    grouped_bars(by_type, shares, COLORS)
    by_type.set(xlabel="type of layer")
    figure.legend(*by_layer.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def explained_variance(variance: pd.DataFrame) -> Figure:
    """Mean share of ‖ΔW‖² that a rank keeps, by type of layer."""
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    last = 2 * variance[variance["explained"] < 0.999]["rank"].max()  # beyond it all is kept
    types = variance[variance["rank"] <= last].groupby("type", sort=False)
    for (name, rows), color, marker in zip(types, COLORS, MARKERS, strict=False):
        values = 100 * rows.groupby("rank")["explained"].mean()
        axis.plot(values.index, values, color=color, marker=marker, markersize=3, label=name)
    for target in (90, 95, 99):
        axis.axhline(target, color="0.8", linewidth=1, zorder=0)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%d"))
    axis.set(xlabel="rank", ylabel="share of ‖ΔW‖² kept (%)", ylim=(0, 102))
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    return figure


def scores(table: pd.DataFrame, ylabel: str = "score (%)") -> Figure:
    """Bars: tasks (the columns) for each row."""
    figure, axis = plt.subplots(figsize=(max(8, 1.4 * len(table.columns)), 4.4), layout="constrained")
    grouped_bars(axis, table.T, COLORS)
    axis.set_ylabel(ylabel)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    return figure


def confusion(matrix: pd.DataFrame) -> Figure:
    """Task × expert, in percent of the task's tokens."""
    figure, axis = plt.subplots(
        figsize=(1.6 + 0.75 * len(matrix.columns), 1.4 + 0.62 * len(matrix)), layout="constrained"
    )
    image = axis.imshow(100 * matrix, cmap="cividis", vmin=0, aspect="auto")
    for row, column in np.ndindex(matrix.shape):
        share = 100 * matrix.iat[row, column]
        bright = share > 50 * matrix.to_numpy().max()
        axis.text(column, row, f"{share:.0f}", ha="center", va="center", color="k" if bright else "w")
    axis.set_xticks(range(len(matrix.columns)), matrix.columns, rotation=45, ha="right")
    axis.set_yticks(range(len(matrix)), matrix.index)
    axis.set(xlabel="expert that served", ylabel="task of the input")
    figure.colorbar(image, ax=axis, label="share of the task's tokens (%)")
    return figure


def layers(accuracy: pd.Series, load: pd.DataFrame, entropy: pd.Series) -> Figure:
    """By layer: how often the own expert is picked, the busiest expert's load, the entropy."""
    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    places = range(1, len(accuracy) + 1)
    chance = 100 / len(load.columns)
    curves = {
        "tokens with their task's expert": 100 * accuracy,
        "tokens of the busiest expert": 100 * load.max(axis=1),
        "entropy of the scores (100: undecided)": 100 * entropy,
    }
    for (label, values), color, marker in zip(curves.items(), COLORS, MARKERS, strict=False):
        axis.plot(places, values.loc[accuracy.index], color=color, marker=marker, markersize=4, label=label)
    axis.axhline(chance, color="0.6", linewidth=1, linestyle="--", label=f"chance ({chance:.3g} %)")
    axis.set(xlabel="linear layer, in the model's order", ylabel="%", ylim=(0, 105))
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def token_maps(images: Tensor, choices: dict[str, Tensor], experts: Sequence[str], titles: Sequence[str]) -> Figure:
    """Each patch of some images coloured by the expert that served it: a row for each image, a column for each layer.

    Args:
        images: (n, 3, H, W), of any range.
        choices: layer → expert numbers of the patches, (n, patches), row by row.
        titles: of the images.
    """
    columns = 1 + len(choices)
    figure, axes = plt.subplots(
        len(images), columns, figsize=(1.9 * columns, 1.75 * len(images) + 1), squeeze=False, layout="constrained"
    )
    colors = ListedColormap([COLORS[number % len(COLORS)] for number in range(len(experts))])
    for row, (image, title) in enumerate(zip(images, titles, strict=True)):
        low, high = image.min(), image.max()
        axes[row, 0].imshow(((image - low) / (high - low)).permute(1, 2, 0).cpu())
        axes[row, 0].set_ylabel(title)
        for column, (layer, of_images) in enumerate(choices.items(), start=1):
            side = int(of_images.shape[1] ** 0.5)
            axes[row, column].imshow(
                of_images[row].reshape(side, side).cpu(), cmap=colors, vmin=-0.5, vmax=len(experts) - 0.5
            )
            if row == 0:
                axes[row, column].set_title(layer, fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    handles = [mpl.patches.Patch(color=colors(number), label=name) for number, name in enumerate(experts)]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, title="expert")
    return figure


def error_accumulation(table: pd.DataFrame) -> Figure:
    """Mean relative error of the hidden states, block by block."""
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for (name, rows), color, marker in zip(table.groupby("model", sort=False), COLORS, MARKERS, strict=False):
        values = 100 * rows.groupby("block")["error"].mean()
        axis.plot(values.index, values, color=color, marker=marker, label=name)
    axis.set(xlabel="block", ylabel="‖h − h₀‖ / ‖h₀‖ (%)", ylim=(0, None))
    axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure


def ablations(table: pd.DataFrame) -> Figure:
    """The average of each variant, as a horizontal bar."""
    figure, axis = plt.subplots(figsize=(8, 0.6 + 0.32 * len(table)), layout="constrained")
    axis.barh(table.index[::-1], table["average"][::-1], color=COLORS[0])
    for place, value in enumerate(table["average"][::-1]):
        axis.text(value - 0.5, place, f"{value:.1f}", va="center", ha="right", color="w", fontsize=8)
    axis.set(xlabel="average score (%)")
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    return figure


def costs(table: pd.DataFrame) -> Figure:
    """What there is in the table of costs against T, k and gate_k: one row of panels for each."""
    measures = {
        "construction": "construction (s)",
        "construction_memory": "its memory (MB)",
        "parameters": "parameters (×)",
        "flops": "FLOPs (×)",
        "forward": "forward time (×)",
        "forward_memory": "its memory (MB)",
    }
    variables = {"experts": "experts T", "k": "rank k", "gate_k": "gate_k"}
    figure, axes = plt.subplots(len(variables), len(measures), figsize=(15, 7), sharey="col", layout="constrained")
    usual = table.iloc[0][list(variables)]  # the first point is the one that the others vary
    for row, (variable, xlabel) in enumerate(variables.items()):
        fixed = [name for name in variables if name != variable]
        line = table[(table[fixed] == usual[fixed]).all(axis=1)].sort_values(variable)
        for axis, (measure, title) in zip(axes[row], measures.items(), strict=True):
            axis.plot(line[variable], line[measure], color=COLORS[row], marker=MARKERS[row])
            axis.set_xlabel(xlabel)
            axis.set_ylim(1 if "×" in title else 0, 1.06 * table[measure].max())
            axis.grid(alpha=0.3)
            if not row:
                axis.set_title(title)
    figure.suptitle("× : relative to the pretrained model")
    return figure
