"""Figures of boards: points, grids and styles."""

from __future__ import annotations

import numpy as np
from sample_reports import write_run

from fusion_bench_smile.leaderboard import arrange, family, leaderboard, rank_grid, scatter, write
from fusion_bench_smile.leaderboard.figures import family_styles


def test_without_individual_models_the_average_is_drawn(tmp_path):
    write_run(tmp_path, "pretrained", 40, 20)
    write_run(tmp_path, "SMILE (gate_k=4, k=8)", 60, 40, 130)
    (board,), _ = leaderboard([tmp_path])
    figure = scatter([board])
    assert figure.axes[0].get_ylabel() == "average score (%)"
    points = np.concatenate([part.get_offsets() for part in figure.axes[0].collections])
    assert sorted(map(tuple, points.tolist())) == [(1.0, 30.0), (1.3, 50.0)]
    assert "retention.png" in {file.name for file in write([board], tmp_path / "out")}


def test_the_grid_of_ranks(runs):
    (board,), _ = leaderboard([runs])
    grid = rank_grid(board)
    assert grid.index.tolist() == [8, 32]
    assert grid.columns.tolist() == [4, 16]
    assert grid.loc[32, 16] == 72
    line = arrange(board, where="gate_k == 4")
    assert rank_grid(line).empty


def test_families_keep_their_style(runs):
    (board,), _ = leaderboard([runs])
    assert family("SMILE of the framework (gate_k=16, k=8)") == "SMILE of the framework"
    assert family("TIES (λ=0.3) †") == "TIES †"
    styles = family_styles([board])
    assert set(styles) == {"SMILE", "individual", "pretrained", "TIES"}
    assert len(set(styles.values())) == 4
