"""Figures of the studies: every study's table can be drawn, with readable labels."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from fusion_bench_smile.analysis import figures
from fusion_bench_smile.reports import render_figure

LAYERS = [f"layers.{number}.fc1" for number in range(3)]
EXPERTS = ["a", "b"]
SHARES = pd.DataFrame([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75]], index=LAYERS, columns=EXPERTS)


def subspace() -> pd.DataFrame:
    rows = [{"layer": layer, "type": "fc1", "I": 0.3, "II": 0.1, "II+III": 0.2} for layer in LAYERS]
    return pd.DataFrame(rows)


def variance() -> pd.DataFrame:
    return pd.DataFrame({"type": "fc1", "rank": [1, 2, 4, 8], "explained": [0.5, 0.8, 0.95, 1.0]})


def costs() -> pd.DataFrame:
    points = [(8, 16, 16), (4, 16, 16), (8, 8, 16), (8, 16, 8)]
    table = pd.DataFrame(points, columns=["experts", "gate_k", "k"])
    measures = ("construction", "construction_memory", "parameters", "flops", "forward", "forward_memory")
    return table.assign(**dict.fromkeys(measures, 1.5))


def token_maps() -> Figure:
    choices = {"0.fc1": torch.zeros(2, 9, dtype=torch.long), "1.fc1": torch.ones(2, 9, dtype=torch.long)}
    return figures.token_maps(torch.rand(2, 3, 6, 6), choices, EXPERTS, ["first", "second"])


@pytest.mark.parametrize(
    ("draw", "texts"),
    [
        (lambda: figures.subspace_energy(subspace()), ["zone I", "zone II+III", "share of ‖ΔW‖² (%)"]),
        (lambda: figures.explained_variance(variance()), ["rank", "share of ‖ΔW‖² kept (%)"]),
        (lambda: figures.score_bars(SHARES), ["score (%)", *EXPERTS]),
        (lambda: figures.confusion(SHARES), ["selected expert", "task of the input", "75"]),
        (lambda: figures.layer_curves(SHARES["a"], SHARES, SHARES["b"]), ["router accuracy", "chance (50 %)"]),
        (token_maps, ["selected expert", "0.fc1", "second"]),
        (
            lambda: figures.error_accumulation(pd.DataFrame({"model": "SMILE", "block": [1, 2], "error": [0.1, 0.2]})),
            ["block", "SMILE"],
        ),
        (lambda: figures.ablations(pd.DataFrame({"average": [70.0, 80.0]}, index=["x", "y"])), ["80.0", "y"]),
        (lambda: figures.costs(costs()), ["FLOPs (×)", "number of experts T"]),
    ],
)
def test_a_figure_of_each_study(draw, texts):
    figure = draw()
    contents = render_figure(figure)
    assert contents["png"].startswith(b"\x89PNG")
    shown = {text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))}
    assert set(texts) <= shown
