"""Leaderboards from synthetic reports: what is counted, what is left out and why, and how it is shown."""

from __future__ import annotations

import io
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_report import report

from fusion_bench_smile.errors import SmileError
from fusion_bench_smile.leaderboard import arrange, boards, gather, leaderboard, pareto, write
from fusion_bench_smile.leaderboard.command import main
from fusion_bench_smile.leaderboard.figures import family, rank_grid, scatter, styles
from fusion_bench_smile.leaderboard.published import load, published_for, sources
from fusion_bench_smile.leaderboard.tables import best_cells, latex, markdown, rich_table
from fusion_bench_smile.report import FILE

CLIP_TASKS = ("sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")


def tasks(**scores: float) -> dict:
    return {name: {"metric": "accuracy", "score": score} for name, score in scores.items()}


def put(root: Path, name: str, a: float, b: float, parameters: int = 100, **changes) -> Path:
    changes = {"label": name, "fingerprint": name, "tasks": tasks(a=a, b=b), "parameters": parameters} | changes
    return report(**changes).write(root / name)


@pytest.fixture
def runs(tmp_path) -> Path:
    """Individual models, three merged ones, and a grid of SMILE."""
    put(tmp_path, "individual", 90, 70, 800, kind="individual", method={})
    put(tmp_path, "pretrained", 40, 20, method={})
    put(tmp_path, "TIES (λ=0.3)", 60, 40, method={"scaling_factor": 0.3})
    for gate_k in (4, 16):
        for k in (8, 32):
            options = {"gate_k": gate_k, "k": k, "top_k": 1}
            put(tmp_path, f"SMILE (gate_k={gate_k}, k={k})", 70 + gate_k, 50 + k / 4, 100 + gate_k + k, method=options)
    return tmp_path


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
    assert board.notes == ["the individual models' parameters are all of theirs together"]


def test_bytes_are_shown_where_they_are_not_the_parameters_over_again(tmp_path):
    put(tmp_path, "SMILE (gate_k=4, k=8)", 80, 60, 150, bytes=600, pretrained_bytes=400)
    (board,), _ = leaderboard([tmp_path])
    assert "bytes" not in markdown(board)
    put(tmp_path, "SMILE (gate_k=4, k=8, int8)", 80, 60, 152, bytes=450, pretrained_bytes=400)
    (board,), _ = leaderboard([tmp_path])
    assert board.table.set_index("method")["bytes"].tolist() == [1.5, 1.125]
    assert "1.12×" in markdown(board)
    assert "1.52×" in markdown(board)


def test_benchmarks_are_never_mixed(runs):
    put(runs, "other", 10, 10, benchmark="another")
    found, _ = leaderboard([runs])
    assert [(board.benchmark, len(board.table)) for board in found] == [("another", 1), ("small", 7)]
    assert pd.isna(found[0].table.iloc[0]["retention"])  # the other benchmark's individual models don't count
    (only,), _ = leaderboard([runs], benchmarks=["an*"])
    assert only.benchmark == "another"


def test_of_the_same_run_the_newest_counts(runs):
    put(runs / "copy", "pretrained", 1, 1, finished="2025-01-01T00:00:00Z")
    put(runs / "later", "TIES (λ=0.3)", 99, 99, finished="2027-01-01T00:00:00Z")
    (board,), skipped = leaderboard([runs])
    table = board.table.set_index("method")
    assert (table.loc["pretrained", "a"], table.loc["TIES (λ=0.3)", "a"]) == (40, 99)
    assert sorted((s.folder.relative_to(runs).as_posix(), "newer" in s.reason) for s in skipped) == [
        ("TIES (λ=0.3)", True),
        ("copy/pretrained", True),
    ]


def test_filters_and_order(runs):
    def methods(**choice) -> list[str]:
        (board,), _ = leaderboard([runs], **choice)
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


def test_a_thousand_folders_some_of_them_damaged(tmp_path):
    rng = random.Random(0)
    expected = {"can't be read": 0, "schema version is 0": 0, "no report": 0, "failed: out of memory": 0}
    expected["no task was evaluated"] = 0
    for number in range(1000):
        file = put(tmp_path, f"run {number}", rng.uniform(0, 100), rng.uniform(0, 100), benchmark=f"b{number % 3}")
        if number % 50 == 0:
            file.write_text(file.read_text()[:300])
            expected["can't be read"] += 1
        elif number % 50 == 1:
            file.write_text(file.read_text().replace('"schema_version": 1', '"schema_version": 0'))
            expected["schema version is 0"] += 1
        elif number % 50 == 2:
            file.rename(file.with_name("overrides.yaml"))
            expected["no report"] += 1
        elif number % 50 == 3:
            put(tmp_path, f"run {number}", 0, 0, status="failed", error="out of memory", tasks={})
            expected["failed: out of memory"] += 1
        elif number % 50 == 4:
            put(tmp_path, f"run {number}", 0, 0, tasks={})
            expected["no task was evaluated"] += 1
    command = [sys.executable, "-m", "fusion_bench_smile.leaderboard", str(tmp_path), "--format", "csv"]
    done = subprocess.run([*command, "--output", str(tmp_path / "out")], capture_output=True, text=True, check=True)
    table = pd.read_csv(io.StringIO(done.stdout))
    assert len(table) == 1000 - sum(expected.values()) == 900
    assert table["benchmark"].nunique() == 3
    assert "100 left out:" in done.stderr
    for reason, count in expected.items():
        assert done.stderr.count(reason) == count, reason
    assert "failed: out of memory" in (tmp_path / "out" / "leaderboard.html").read_text()


def test_markdown_and_latex(runs):
    (board,), _ = leaderboard([runs])
    text = markdown(board)
    lines = text.splitlines()
    assert lines[2].startswith("| method | a | b | average | retention | parameters | seconds | memory (MB) |")
    assert "| SMILE (gate_k=16, k=32) | **86.0** | **58.0** | **72.0** | **90.0** | 1.48× | 1.50 | 2 |" in lines
    assert "| individual | 90.0 | 70.0 | 80.0 | 100.0 | 8.00× |  |  |" in lines  # the reference is never the best
    code = latex(board)
    assert r"SMILE (gate\_k=16, k=32) & \textbf{86.0}" in code
    assert r"TIES ($\lambda$=0.3)" in code
    assert r"1.48$\times$" in code
    assert code.count(r"\\") == 1 + len(board.table)
    assert not set("λ×†") & set(code)


def test_equal_values_are_all_best(tmp_path):
    for name in ("one", "two"):
        put(tmp_path, name, 50.01, 50)
    put(tmp_path, "three", 10, 50.04)
    (board,), _ = leaderboard([tmp_path])
    best = best_cells(board)
    assert best["a"].tolist() == [True, True, False]
    assert best["b"].all()  # they are shown as the same number


def test_a_narrow_terminal_gets_no_single_tasks(runs):
    (board,), _ = leaderboard([runs])
    headers = [str(column.header) for column in rich_table(board, tasks=False).columns]
    assert headers == ["method", "average", "retention", "parameters", "seconds", "memory (MB)"]
    output = io.StringIO()
    Console(file=output, width=200).print(rich_table(board))
    assert "SMILE (gate_k=16, k=32)" in output.getvalue()


def test_what_is_written(runs, tmp_path):
    (board,), _ = leaderboard([runs])
    files = write([board], tmp_path / "out")
    names = {file.name for file in files}
    assert names == {
        "leaderboard.csv", "leaderboard.html", "leaderboard.md", "leaderboard.tex", "ranks.png", "ranks.svg",
        "retention.png", "retention.svg", "tasks.png", "tasks.svg",
    }  # fmt: skip
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    assert all(file.stat().st_size > 500 for file in files)
    table = pd.read_csv(tmp_path / "out" / "leaderboard.csv")
    assert table.loc[table["method"] == "pretrained", "a"].item() == 40


def test_without_individual_models_the_average_is_drawn(tmp_path):
    put(tmp_path, "pretrained", 40, 20)
    put(tmp_path, "SMILE (gate_k=4, k=8)", 60, 40, 130)
    (board,), _ = leaderboard([tmp_path])
    figure = scatter([board])
    assert figure.axes[0].get_ylabel() == "average score (%)"
    points = np.concatenate([part.get_offsets() for part in figure.axes[0].collections])
    assert sorted(map(tuple, points.tolist())) == [(1.0, 30.0), (1.3, 50.0)]
    assert "retention.png" in {file.name for file in write([board], tmp_path / "out")}


def test_an_interrupted_write_leaves_no_half_of_it(runs, tmp_path, monkeypatch):
    (board,), _ = leaderboard([runs])
    monkeypatch.setattr("fusion_bench_smile.leaderboard.command.page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write([board], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


points = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12)


@given(points)
def test_the_pareto_front(values):
    table = pd.DataFrame(values, columns=["parameters", "average"])
    front = pareto(table)
    chosen = {tuple(row) for row in table[front].to_numpy()}
    dominated = {
        (cost, gain)
        for cost, gain in values
        if any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in values)
    }
    assert chosen == set(values) - dominated
    assert len(chosen) == front.sum()


def test_the_front_ignores_what_is_unknown():
    table = pd.DataFrame({"parameters": [1, np.nan, 2], "average": [50, 99, np.nan]})
    assert pareto(table).tolist() == [True, False, False]


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
    found = styles([board])
    assert set(found) == {"SMILE", "individual", "pretrained", "TIES"}
    assert len(set(found.values())) == 4


def test_published_results_stand_beside_measured_ones(tmp_path):
    scores = tasks(**dict.fromkeys(CLIP_TASKS, 80.0))
    put(tmp_path, "mine", 0, 0, tasks=scores, modelpool="CLIPVisionModelPool/clip-vit-base-patch32_TA8")
    (board,), _ = leaderboard([tmp_path])
    assert board.measured["method"].tolist() == ["mine"]
    others = board.table[board.table["origin"] == "published"]
    assert len(others) == 19
    assert others["method"].str.endswith(" †").all()
    assert board.table.iloc[0]["method"] == "mine"  # published rows come last, though some are better
    row = others.set_index("method").loc["Weight-Ensembling MoE †"]
    assert (row["sun397"], row["average"]) == (73.7, 89.2)
    assert row["retention"] == pytest.approx(100 * 89.2 / 90.3)
    assert not best_cells(board).loc[others.index].any(axis=None)
    assert any("published, not measured here" in note and "fusion-bench" in note for note in board.notes)
    (without,), _ = leaderboard([tmp_path], published=False)
    assert len(without.table) == 1


def test_published_results_need_the_same_models_and_tasks():
    assert published_for("CLIPVisionModelPool/clip-vit-base-patch32_TA8", ("mnist",)) is None
    assert published_for("SmileEmbedded/gentle", CLIP_TASKS) is None
    found = published_for("CLIPVisionModelPool/clip-vit-base-patch16_TA8_lora", CLIP_TASKS)
    assert found is None  # LoRA models are others
    lora = published_for("Seq2SeqLMPool/flan-t5-base_glue_lora16", load("flan_t5_base_glue_lora16").table.columns[:-1])
    assert lora.title == "Flan-T5-base, GLUE, LoRA"


@pytest.mark.parametrize("name", sources()["benchmarks"])
def test_published_averages_are_those_of_the_tasks(name):
    found = load(name)
    assert found.individual in found.table.index
    difference = (found.table.drop(columns="average").mean(axis=1) - found.table["average"]).abs()
    # as published: RTE of the simple average is 90.5 where its average says 80.5
    known = ["Simple Average"] if name == "flan_t5_base_glue_lora16" else []
    assert (difference.drop(known) < 0.11).all(), difference[difference >= 0.11]


def test_the_published_data_is_what_was_handed_down(request):
    shared = request.config.rootpath.parent / "shared" / "published"
    if not shared.exists():
        pytest.skip("the tables that the data was taken from are not here")
    for name in sources()["benchmarks"]:
        theirs = pd.read_csv(shared / f"{name}.csv", index_col="method")
        assert np.array_equal(theirs.to_numpy(), load(name).table.to_numpy())


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    for arguments, message in [
        ([str(tmp_path / "nowhere")], "is no folder"),
        ([str(tmp_path)], "no run is left to show: 0 complete runs"),
    ]:
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            main(arguments)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FILE).write_text("{")
    with pytest.raises(SystemExit, match=r"(?s)0 complete runs.*run: it can't be read"):
        main([str(tmp_path)])


def test_the_command_prints_and_writes(runs, tmp_path, capsys):
    main([str(runs), "--format", "markdown", "--output", str(tmp_path / "out"), "--method", "SMILE*"])
    printed = capsys.readouterr()
    assert printed.out.count("| SMILE (") == 4
    assert "leaderboard.html" in printed.err
    main([str(runs)])
    assert "SMILE (gate_k=16, k=32)" in capsys.readouterr().out


def test_boards_of_nothing():
    assert boards([]) == []
    assert gather([]) == ([], [])
