"""Shared helpers of figures."""

from __future__ import annotations

import pandas as pd
import pytest
from matplotlib.figure import Figure

from fusion_bench_smile.reports import STYLES, grouped_bars, save_figure


def test_a_figure_is_saved_as_png_and_svg(tmp_path):
    figure = Figure()
    figure.subplots().plot([1, 2])
    files = save_figure(figure, tmp_path / "a.name with dots")
    assert [file.name for file in files] == ["a.name with dots.png", "a.name with dots.svg"]
    assert sorted(file.name for file in tmp_path.iterdir()) == [file.name for file in files]
    assert files[0].read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in files[1].read_bytes()


def test_grouped_bars_have_a_group_for_each_row():
    axis = Figure().subplots()
    table = pd.DataFrame({"one": [1.0, 2.0, 3.0], "two": [4.0, 5.0, 6.0]}, index=["a", "b", "c"])
    grouped_bars(axis, table, [color for color, _ in STYLES])
    assert [label.get_text() for label in axis.get_xticklabels()] == ["a", "b", "c"]
    first, second = axis.containers
    assert (first.get_label(), second.get_label()) == ("one", "two")
    assert [bar.get_height() for bar in second] == [4.0, 5.0, 6.0]
    for bar, other in zip(first, second, strict=True):
        assert bar.get_x() + bar.get_width() == pytest.approx(other.get_x())  # bars of a group touch


def test_styles_are_distinct():
    assert len({color for color, _ in STYLES}) == len({marker for _, marker in STYLES}) == len(STYLES)
