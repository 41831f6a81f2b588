"""The command: hundreds of folders, error messages, and the files it writes."""

from __future__ import annotations

import io
import random
import subprocess
import sys
from pathlib import Path

import jinja2
import pandas as pd
import pytest
from sample_reports import write_run

from fusion_bench_smile.leaderboard import leaderboard, write
from fusion_bench_smile.leaderboard.command import main
from fusion_bench_smile.reports import REPORT_FILE


@pytest.mark.cli
def test_hundreds_of_folders_some_of_them_damaged(tmp_path):
    rng = random.Random(0)
    expected = {"can't be read": 0, "schema version is 0": 0, "no report": 0, "failed: out of memory": 0}
    expected["no task was evaluated"] = 0
    for number in range(200):
        scores = rng.uniform(0, 100), rng.uniform(0, 100)
        file = write_run(tmp_path, f"run {number}", *scores, benchmark=f"b{number % 3}")
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
            write_run(tmp_path, f"run {number}", 0, 0, status="failed", error="out of memory", tasks={})
            expected["failed: out of memory"] += 1
        elif number % 50 == 4:
            write_run(tmp_path, f"run {number}", 0, 0, tasks={})
            expected["no task was evaluated"] += 1
    command = [Path(sys.executable).with_name("smile-leaderboard"), str(tmp_path), "--format", "csv"]
    done = subprocess.run([*command, "--output", str(tmp_path / "out")], capture_output=True, text=True, check=True)
    table = pd.read_csv(io.StringIO(done.stdout))
    assert len(table) == 200 - sum(expected.values()) == 180
    assert table["benchmark"].nunique() == 3
    assert "20 left out:" in done.stderr
    for reason, count in expected.items():
        assert done.stderr.count(reason) == count, reason
    assert "failed: out of memory" in (tmp_path / "out" / "leaderboard.html").read_text()


def test_the_files_that_are_written(runs, tmp_path):
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


def test_a_failed_write_leaves_no_files(runs, tmp_path):
    (board,), _ = leaderboard([runs])
    with pytest.raises(jinja2.UndefinedError):
        write([board], tmp_path / "out", skipped=["no run"])
    assert not list((tmp_path / "out").iterdir())


def test_error_messages(tmp_path):
    for arguments, message in [
        ([str(tmp_path / "nowhere")], "is no folder"),
        ([str(tmp_path)], "no run is left to show: 0 complete runs"),
    ]:
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            main(arguments)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / REPORT_FILE).write_text("{")
    with pytest.raises(SystemExit, match=r"(?s)0 complete runs.*run: the report can't be read"):
        main([str(tmp_path)])


def test_the_command_prints_and_writes(runs, tmp_path, capsys):
    main([str(runs), "--format", "markdown", "--output", str(tmp_path / "out"), "--method", "SMILE*"])
    printed = capsys.readouterr()
    assert printed.out.count("| SMILE (") == 4
    assert "leaderboard.html" in printed.err
    main([str(runs)])
    assert "SMILE (gate_k=16, k=32)" in capsys.readouterr().out
