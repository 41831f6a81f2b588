"""What a run prints at its end."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from sample_reports import report

from fusion_bench_smile.framework.run_summary import print_summary


def printed(run, individual=None, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_summary(run, Path("outputs/runs/smile/smile_report.json"), individual or {}, console)
    return console.file.getvalue()


def test_the_table_has_scores_and_retention_and_the_lines_what_comes_next():
    individual = report().tasks | {"b": report().tasks["b"].model_copy(update={"score": 75.0})}
    lines = printed(report(retention=90.0), individual).splitlines()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert cells == [["a", "80.0", "100.0"], ["b", "60.0", "80.0"], ["average", "70.0", "90.0"]]
    assert lines[0].strip() == "SMILE (gate_k=4, k=8): small"
    assert lines[-3:] == [
        "0.0 M parameters, 1.50 × the pretrained model's, built in 1.5 s, evaluated in 2.0 s",
        "report: outputs/runs/smile/smile_report.json",
        "next: smile-leaderboard outputs/runs",
    ]
    assert max(map(len, lines)) <= 83


def test_text_of_a_run_is_no_markup():
    assert "[/red] x" in printed(report(label="[/red] x"))
