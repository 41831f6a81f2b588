"""Boards as Markdown, LaTeX and tables of the terminal."""

from __future__ import annotations

import io

from rich.console import Console
from sample_reports import write_run

from fusion_bench_smile.leaderboard import latex, leaderboard, markdown, rich_table
from fusion_bench_smile.leaderboard.tables import best_cells


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_bytes_are_shown_where_they_differ_from_the_parameters(tmp_path):
    write_run(tmp_path, "SMILE (gate_k=4, k=8)", 80, 60, 150, bytes=600, pretrained_bytes=400)
    (board,), _ = leaderboard([tmp_path])
    assert "bytes" not in markdown(board)
    write_run(tmp_path, "SMILE (gate_k=4, k=8, int8)", 80, 60, 152, bytes=450, pretrained_bytes=400)
    (board,), _ = leaderboard([tmp_path])
    assert board.table.set_index("method")["bytes"].tolist() == [1.5, 1.125]
    assert "1.12×" in markdown(board)
    assert "1.52×" in markdown(board)


def test_markdown_and_latex(runs):
    (board,), _ = leaderboard([runs])
    rows = [cells(line) for line in markdown(board).splitlines()]
    assert rows[2][:8] == ["method", "a", "b", "average", "retention", "parameters", "seconds", "memory (MB)"]
    best = ["**86.0**", "**58.0**", "**72.0**", "**90.0**", "1.48×", "1.50", "2"]
    assert ["SMILE (gate_k=16, k=32)", *best] in rows
    # the reference is never the best
    assert ["individual", "90.0", "70.0", "80.0", "100.0", "8.00×", "", ""] in rows
    code = latex(board)
    assert r"SMILE (gate\_k=16, k=32) & \textbf{86.0}" in code
    assert r"TIES ($\lambda$=0.3)" in code
    assert r"1.48$\times$" in code
    assert code.count(r"\\") == 1 + len(board.table)
    assert not set("λ×†") & set(code)


def test_equal_values_are_all_best(tmp_path):
    for name in ("one", "two"):
        write_run(tmp_path, name, 50.01, 50)
    write_run(tmp_path, "three", 10, 50.04)
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
