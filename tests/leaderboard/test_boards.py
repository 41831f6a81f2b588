"""Boards from synthetic reports: rows, order, filters, and the Pareto front."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_reports import CLIP_TASKS, accuracies, write_run

from fusion_bench_smile.exceptions import SmileError
from fusion_bench_smile.leaderboard import boards, leaderboard, pareto
from fusion_bench_smile.leaderboard.tables import best_cells


def test_a_board_has_a_row_for_each_run(runs):
    (board,), skipped = leaderboard([runs])
    assert not skipped
    assert board.tasks == ["a", "b"]
    table = board.table.set_index("method")
    assert list(table.index)[:2] == ["individual", "SMILE (gate_k=16, k=32)"]
    assert table.loc["individual", ["average", "retention", "parameters"]].tolist() == [80, 100, 8]
    assert pd.isna(table.loc["individual", "seconds"])
    assert table.loc["SMILE (gate_k=16, k=32)", ["a", "b", "average", "retention"]].tolist() == [86, 58, 72, 90]
    assert table.loc["SMILE (gate_k=16, k=32)", ["parameters", "seconds", "memory"]].tolist() == [1.48, 1.5, 2]
    assert board.notes == ["the parameters of the individual models are those of all models together"]


def test_benchmarks_are_never_mixed(runs):
    write_run(runs, "other", 10, 10, benchmark="another")
    found, _ = leaderboard([runs])
    assert [(board.benchmark, len(board.table)) for board in found] == [("another", 1), ("small", 7)]
    assert pd.isna(found[0].table.iloc[0]["retention"])  # the other benchmark's individual models don't count
    (only,), _ = leaderboard([runs], benchmarks=["an*"])
    assert only.benchmark == "another"


def test_filters_and_order(runs):
    def methods(**options) -> list[str]:
        (board,), _ = leaderboard([runs], **options)
        return board.table["method"].tolist()

    assert methods(methods=["TIES*", "pre*"]) == ["TIES (λ=0.3)", "pretrained"]
    assert methods(where="parameters < 1.3 and gate_k == 16") == ["SMILE (gate_k=16, k=8)"]
    assert methods(sort="parameters")[2:4] == ["SMILE (gate_k=4, k=8)", "SMILE (gate_k=16, k=8)"]
    assert methods(sort="b")[0] == "individual"
    with pytest.raises(SmileError, match="--sort speed: the columns are method, a, b, average"):
        methods(sort="speed")
    with pytest.raises(SmileError, match=r"--where 'speed > 1'.*the columns are"):
        methods(where="speed > 1")
    with pytest.raises(SmileError, match="no run is left to show: 7 complete runs"):
        methods(methods=["nothing"])
    with pytest.raises(SmileError, match="is no folder"):
        leaderboard([runs / "nowhere"])


def test_boards_of_no_runs():
    assert boards([]) == []


points = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12)


@given(points)
def test_the_pareto_front(values):
    table = pd.DataFrame(values, columns=["parameters", "average"])
    front = pareto(table)
    on_front = {tuple(row) for row in table[front].to_numpy()}
    dominated = {
        (cost, score)
        for cost, score in values
        if any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in values)
    }
    assert on_front == set(values) - dominated
    assert len(on_front) == front.sum()


def test_the_front_ignores_unknown_values():
    table = pd.DataFrame({"parameters": [1, np.nan, 2], "average": [50, 99, np.nan]})
    assert pareto(table).tolist() == [True, False, False]


def test_published_results_stand_beside_measured_ones(tmp_path):
    scores = accuracies(**dict.fromkeys(CLIP_TASKS, 80.0))
    write_run(tmp_path, "measured", 0, 0, tasks=scores, modelpool="CLIPVisionModelPool/clip-vit-base-patch32_TA8")
    (board,), _ = leaderboard([tmp_path])
    assert board.measured["method"].tolist() == ["measured"]
    published = board.table[board.table["origin"] == "published"]
    smile = published[published["method"].str.startswith("SMILE")].set_index("method")
    assert (len(published), len(smile), len(board.published_smile)) == (22, 3, 80)
    row = smile.loc["SMILE (gate_k=16, k=32) †"]
    assert (row["average"], row["gate_k"], row["k"]) == (88.18, 16, 32)
    assert (row["retention"], row["parameters"]) == pytest.approx((97.65, 1.614), abs=0.01)
    assert published["method"].str.endswith(" †").all()
    assert board.table.iloc[0]["method"] == "measured"  # published rows come last, though some are better
    row = published.set_index("method").loc["Weight-Ensembling MoE †"]
    assert (row["sun397"], row["average"]) == (73.7, 89.2)
    assert row["retention"] == pytest.approx(100 * 89.2 / 90.3)
    assert not best_cells(board).loc[published.index].any(axis=None)
    assert any("published, not measured here" in note and "fusion-bench" in note for note in board.notes)
    (without,), _ = leaderboard([tmp_path], published=False)
    assert len(without.table) == 1
