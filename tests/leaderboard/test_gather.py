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
