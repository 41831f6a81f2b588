"""Discovery of reports: the newest of each run, and a reason for each run that is left out."""

from __future__ import annotations

from sample_reports import write_run

from fusion_bench_smile.leaderboard import gather, leaderboard


def test_the_newest_report_of_a_run_counts(runs):
    write_run(runs / "copy", "pretrained", 1, 1, finished="2025-01-01T00:00:00Z")
    write_run(runs / "later", "TIES (λ=0.3)", 99, 99, finished="2027-01-01T00:00:00Z")
    (board,), skipped = leaderboard([runs])
    table = board.table.set_index("method")
    assert (table.loc["pretrained", "a"], table.loc["TIES (λ=0.3)", "a"]) == (40, 99)
    assert sorted((s.folder.relative_to(runs).as_posix(), "newer" in s.reason) for s in skipped) == [
        ("TIES (λ=0.3)", True),
        ("copy/pretrained", True),
    ]


def test_no_folders():
    assert gather([]) == ([], [])


def test_a_run_of_the_frameworks_own_program_is_read(runs):
    folder = runs / "plain"
    folder.mkdir()
    (folder / "overrides.yaml").write_text("[]")
    (folder / "config.yaml").write_text(
        "method: {_target_: fusion_bench.method.SimpleAverageAlgorithm}\nmodelpool: {}\n"
    )
    (folder / "hydra.yaml").write_text("hydra: {runtime: {choices: {modelpool: pool, taskpool: tasks}}}")
    (folder / "program_report.json").write_text('{"a": {"accuracy": 0.25}, "b": {"accuracy": 0.75}}')
    (board,) = [board for board in leaderboard([runs])[0] if board.benchmark == "pool · tasks"]
    assert board.table[["method", "a", "b", "average"]].to_numpy().tolist() == [["simple average", 25.0, 75.0, 50.0]]
    (folder / "program_report.json").write_text("[")
    assert [(run.folder, run.reason[:36]) for run in leaderboard([runs])[1]] == [
        (folder, "the report of the framework's progra")
    ]
    (folder / "program_report.json").unlink()
    assert [run.reason for run in leaderboard([runs])[1]] == [
        "no report: the run was a dry run, was killed, or still goes on"
    ]
