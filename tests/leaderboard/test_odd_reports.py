"""Odd reports: each is left out with one line, or shown as it is, and no other row changes."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from processes import start
from rich.console import Console
from sample_reports import accuracies, report, write_run

from fusion_bench_smile.io.text import printable
from fusion_bench_smile.leaderboard import (
    Board,
    boards,
    gather,
    latex,
    leaderboard,
    markdown,
    page,
    rich_table,
    scatter,
    task_bars,
    write,
)
from fusion_bench_smile.leaderboard import csv as csv_of
from fusion_bench_smile.leaderboard.boards import RESERVED, task_columns
from fusion_bench_smile.leaderboard.command import main
from fusion_bench_smile.reports import REPORT_FILE, render_figure

LONG = 10_000 * "x"
NASTY = (
    "[/red]", "[bold]x[/bold]", "[*]", ":smile:", "$x$ and \\$", "$\\frac{$", "100 %", "_hidden", "", " ", "\0", "a\nb",
    "\t=1+1", '=HYPERLINK("https://example.org")', "+1", "-1", "@SUM(A1)", "＝1", "a|b", "`x`", "![x](y)", "&lt;",
    "<script>alert(1)</script>", "</script><img src=x onerror=alert(1)>", "\\ --", '"quoted", text', "NA", LONG,
    "漢字 \U0001f600", "\u202eabc", "method", "benchmark", "self", "memory (MB)", "average", "__proto__",
    "SMILE (gate_k=4, k=8)",
)  # fmt: skip
TEXTS = ("method", "origin", "kind", "device", "folder", "benchmark")
MARKDOWN = MarkdownIt("commonmark").enable("table")
names = st.sampled_from(NASTY) | st.text(max_size=20)


def write_raw(folder: Path, **changes: Any) -> None:
    """Write a report that need not be valid."""
    folder.mkdir(parents=True)
    (folder / REPORT_FILE).write_text(json.dumps(report().model_dump(mode="json") | {"fingerprint": "odd"} | changes))


def rows_of(board: Board) -> dict[str, dict[str, Any]]:
    """Method → the values of its row that are known."""
    return {row["method"]: row.dropna().to_dict() for _, row in board.table.iterrows()}


def odd_file(name: str) -> Callable[[Path], object]:
    """The function that puts something else at the place of a report."""
    return {
        "a folder": lambda file: file.mkdir(),
        "no UTF-8": lambda file: file.write_bytes(b'{"label": "\xff"}'),
        "nested": lambda file: file.write_text(100_000 * '{"a":' + "1" + 100_000 * "}"),
        "a list": lambda file: file.write_text("[1, 2]"),
        "many digits": lambda file: file.write_text('{"seed": ' + 5000 * "1" + "}"),
        "a loop": lambda file: file.symlink_to(file.name),
        "a pipe": lambda file: os.mkfifo(file),
        "empty": lambda file: file.touch(),
    }[name]


REFUSED = {
    "no tasks": {"tasks": {}}, "a failure": {"status": "failed", "error": "one\ntwo\x00"},
    "no time zone": {"finished": "2026-01-01T00:00:00"},
    "negative sizes": {"parameters": -5}, "an enormous size": {"bytes": 10**4000},
    "an unknown entry": {"a\nb": 1}, "an infinite score": {"tasks": accuracies(a=math.inf)},
}  # fmt: skip


@pytest.mark.parametrize(
    "case", ["a folder", "no UTF-8", "nested", "a list", "many digits", "a loop", "a pipe", "empty"]
)
def test_an_odd_file_is_left_out(runs, case):
    (expected,), _ = leaderboard([runs])
    (runs / "odd\nfolder").mkdir()
    odd_file(case)(runs / "odd\nfolder" / REPORT_FILE)
    (board,), (skipped,) = leaderboard([runs])
    assert board.table.equals(expected.table)
    assert skipped.folder == runs / "odd\nfolder"
    assert len(str(skipped).splitlines()) == 1
    assert r"odd\nfolder: the report can't be read: " in str(skipped) or "schema version" in str(skipped)


@pytest.mark.parametrize("case", REFUSED)
def test_an_odd_report_is_left_out(runs, case):
    (expected,), _ = leaderboard([runs])
    write_raw(runs / "odd", **REFUSED[case])
    (board,), (skipped,) = leaderboard([runs])
    assert board.table.equals(expected.table)
    assert skipped.folder == runs / "odd"
    assert len(str(skipped).splitlines()) == 1


SHOWN = {
    "an infinite top_k": {"method": {"top_k": math.inf}}, "top_k is no number": {"method": {"top_k": math.nan}},
    "an enormous k": {"method": {"k": 10**400, "gate_k": -(10**400)}}, "k is a list": {"method": {"k": [1]}},
    "k is true": {"method": {"k": True, "gate_k": None}},
    "finished before it started": {"started": "2030-01-01T00:00:00Z"},
    "a score of null": {"tasks": accuracies(a=None, b=1.0)},
    "negative scores": {"tasks": accuracies(a=-50.0, b=-1e-300)},
    "enormous scores": {"tasks": accuracies(a=1.7e308, b=1.7e308)},
    "enormous scores of both signs": {"tasks": accuracies(a=1.7e308, b=-1.7e308)},
    "an enormous ratio": {"parameters": 2**62, "pretrained_parameters": 1},
    "enormous times": {"construction": {"seconds": 1e300, "peak_host_bytes": -1}, "samples_per_second": 1e308},
    "a surrogate": {"label": "\ud800", "tasks": accuracies(a=1.0, b=2.0, **{"\ud800": 3.0})},
    "the label of another": {"label": "pretrained "},
    "many tasks": {"tasks": accuracies(**{f"task {number}": 50.0 for number in range(100)})},
    "columns as tasks": {"tasks": accuracies(a=1.0, b=2.0, **dict.fromkeys(sorted(RESERVED | {"self"}), 50.0))},
    "odd tasks": {"tasks": accuracies(a=1.0, b=2.0, **dict.fromkeys(NASTY, 50.0))},
    "odd individual models": {"kind": "individual", "tasks": accuracies(a=-1e-320, c=1e300), "label": "odd"},
    "zero parameters": {"parameters": 0, "pretrained_parameters": 0},
}  # fmt: skip


@pytest.mark.parametrize("case", SHOWN)
def test_an_odd_report_is_shown_and_changes_no_other_row(runs, case):
    (expected,), _ = leaderboard([runs])
    write_raw(runs / "odd", **{"label": "odd"} | SHOWN[case])
    (board,), skipped = leaderboard([runs])
    assert not skipped
    label = printable(SHOWN[case].get("label", "odd"))
    rows = rows_of(board)
    assert rows.pop(label)["origin"] == "measured"
    assert rows == rows_of(expected)
    check_texts(board)


@pytest.mark.parametrize("name", NASTY)
def test_odd_names_are_shown(runs, name):
    write_raw(runs / "odd", label=name, benchmark=name, tasks=accuracies(**{name: 50.0, "a": 20.0, "": 1.0}))
    found, skipped = leaderboard([runs])
    assert not skipped
    odd = next(board for board in found if board.benchmark == printable(name))
    assert odd.table["method"].tolist() == [printable(name)]
    assert len(set(odd.tasks)) == len({name, "a", ""})
    check_texts(odd)


@pytest.mark.filterwarnings("error::UserWarning")
def test_odd_names_in_figures_and_at_the_command_line(tmp_path, capsys):
    for number, name in enumerate(NASTY):
        tasks = accuracies(**dict.fromkeys(NASTY, 50.0 + number))
        write_raw(tmp_path / "runs" / str(number), label=name, fingerprint=name, benchmark="$\\frac{$", tasks=tasks)
    main([str(tmp_path / "runs"), "--output", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert all(printable(name, 199)[:-1] in printed.out for name in NASTY)
    assert "left out" not in printed.err
    check_figures(sorted((tmp_path / "out").iterdir()))
    (board,), _ = leaderboard([tmp_path / "runs"])
    legend = {text.get_text() for text in scatter([board]).legends[0].get_texts()}
    assert {" _hidden", r"\$x\$ and \\$", r"\$\frac{\$", "[/red]"} <= legend


def test_columns_of_tasks_differ_from_all_others():
    columns = task_columns(["method", "method (task)", "a\nb", r"a\nb", "", " ", "a", LONG, LONG + "y"])
    assert list(columns.values())[:7] == [
        "method (task)", "method (task) (2)", r"a\nb", r"a\nb (2)", "(unnamed)", "(unnamed) (2)", "a",
    ]  # fmt: skip
    assert columns[LONG] == 199 * "x" + "…"
    assert columns[LONG + "y"] == columns[LONG] + " (2)"


def test_columns_with_odd_names_spoil_no_condition(runs):
    write_raw(runs / "odd", tasks=accuracies(a=1.0, b=2.0, **dict.fromkeys(("method", "'", "`", "#", "a b"), 50.0)))
    (board,), _ = leaderboard([runs], where="a > 80 and method.str.startswith('SMILE')", sort="method (task)")
    assert len(board.table) == 2
    (board,), _ = leaderboard([runs], where="`a b` == 50")
    assert board.table["method (task)"].tolist() == [50]


def test_ranks_without_parameters(tmp_path):
    for number, (gate_k, k) in enumerate([(4, 8), (4, 32), (16, 8), (16, 32)]):
        options = {"gate_k": gate_k, "k": k}
        write_run(tmp_path, f"SMILE (gate_k={gate_k}, k={k})", number, 1, parameters=None, method=options)
    (board,), _ = leaderboard([tmp_path])
    assert {"ranks.png", "tasks.png"} <= {file.name for file in write([board], tmp_path / "out")}


def test_figures_of_many_benchmarks_and_tasks(tmp_path):
    for number in range(14):
        tasks = accuracies(**{f"task {number}": 1.0 for number in range(100)})
        write_run(tmp_path, f"run {number}", 1, 1, benchmark=f"b{number}", tasks=tasks)
    found, _ = leaderboard([tmp_path])
    figure = scatter(found)
    assert len(figure.axes) == 12
    assert len(task_bars(found[0]).axes[0].get_xticks()) == 60
    assert render_figure(figure)["png"].startswith(b"\x89PNG")


def test_folders_nested_deeply(tmp_path, monkeypatch):
    write_run(tmp_path, "run", 1, 1)
    monkeypatch.chdir(tmp_path)
    for _ in range(1500):
        os.mkdir("d")
        os.chdir("d")
    monkeypatch.chdir(tmp_path)
    try:
        assert [run.folder.name for run in gather([tmp_path]).runs] == ["run"]
    finally:  # pytest's own removal of old folders is recursive
        subprocess.run(["rm", "-r", "d"], check=True)


def test_reports_that_are_written_meanwhile(tmp_path):
    write_run(tmp_path, "run", 1, 1, fingerprint="0")

    def writer() -> None:
        for turn in range(100):
            write_run(tmp_path, "run", turn, 1, fingerprint=str(turn % 3))

    child, count = start(writer), 0
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        gathered = gather([tmp_path])
        assert not gathered.skipped
        assert [run.report.label for run in gathered.runs] == ["run"]
        count += 1
    assert ended == (child, 0)
    assert count > 1


def test_an_output_folder_that_cannot_be_written(runs, tmp_path, capsys):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "out", Path("/proc/smile")):
        with pytest.raises(SystemExit, match=r"^error: \[Errno .*$"):
            main([str(runs), "--output", str(place)])


@st.composite
def odd_reports(draw) -> dict[str, Any]:
    score = st.none() | st.floats(allow_nan=False, allow_infinity=False)
    option = st.none() | st.integers() | st.floats() | names | st.sampled_from([10**400])
    scores = draw(st.dictionaries(names, score, min_size=1, max_size=4))
    return {
        "label": draw(names), "benchmark": draw(names), "modelpool": draw(names),
        "tasks": {name: {"metric": "accuracy", "score": value} for name, value in scores.items()},
        "models": draw(st.lists(names, max_size=2)), "kind": draw(st.sampled_from(["merged", "individual"])),
        "method": draw(st.dictionaries(st.sampled_from(["k", "gate_k", "top_k"]) | names, option, max_size=3)),
        "parameters": draw(st.none() | st.integers(0, 2**63 - 1)), "retention": draw(score),
    }  # fmt: skip


def check_all(reports: list[dict[str, Any]], check: Callable[[list[Board], Path], None]) -> None:
    """Gather some reports and check their boards, each of which is shown in one row."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, changes in enumerate(reports):
            write_raw(folder / "runs" / str(number), **changes, fingerprint=str(number))
        found, skipped = leaderboard([folder / "runs"])
        assert not skipped
        assert sum(len(board.table) for board in found) == len(reports)
        check(found, folder)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(odd_reports(), min_size=1, max_size=4))
def test_any_text_in_all_tables(reports):
    check_all(reports, lambda found, _: [check_texts(board) for board in found] and check_page(found))


@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.lists(odd_reports(), min_size=1, max_size=2))
def test_any_text_in_all_files(reports):
    check_all(reports, lambda found, folder: check_figures(write(found, folder / "out")))


def check_texts(board: Board) -> None:
    """All tables of a board have one line for each row, and no text is a formula, markup or a control character."""
    count = len(board.table)
    output = io.StringIO()
    for tasks in (True, False):
        Console(file=output, width=20_000).print(rich_table(board, tasks))
    assert board.table["method"].iloc[0].strip() in output.getvalue()
    table = [line for line in markdown(board, title=False).splitlines() if line.startswith("|")]
    assert len(table) == count + 2
    tokens = MARKDOWN.parse(markdown(board))
    columns = sum(token.type == "th_open" for token in tokens)
    assert sum(token.type == "td_open" for token in tokens) == columns * count
    notes = [token for token in tokens if token.type == "paragraph_open"]
    assert len(notes) == len(board.notes)
    assert {child.type for token in tokens for child in token.children or []} <= {"text", "strong_open", "strong_close"}
    tex = latex(board)
    assert tex.count(r"\\" + "\n") == count + 1
    braces = re.sub(r"\\[{}]", "", tex)
    assert braces.count("{") == braces.count("}")
    assert not re.search(r"\\\\\s*[\[*]", tex)
    check_csv(csv_of([board]), count)
    for text in (markdown(board), tex, csv_of([board])):
        assert text.replace("\n", "").isprintable()


def check_csv(text: str, rows: int) -> None:
    assert len(pd.read_csv(io.StringIO(text))) == rows
    head, *lines = csv.reader(io.StringIO(text))
    assert len(lines) == rows
    cells = [("method", name) for name in head]
    cells += [pair for line in lines for pair in zip(head, line, strict=True)]
    for column, cell in cells:
        if column in TEXTS or not cell:
            assert not cell.strip().startswith(tuple("=+-@＝＋－＠"))
        else:
            assert math.isfinite(float(cell))


class Tags(HTMLParser):
    """The tags of a page, their attributes, and the content of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script":
            self.scripts.append(data)


def check_page(found: list[Board]) -> None:
    usual, odd = Tags(page(boards([]))), Tags(page(found))
    assert (odd.tags, odd.attributes) == (usual.tags, usual.attributes)
    assert odd.tags.count("script") == 2
    data = json.loads(odd.scripts[0])
    assert [len(board["rows"]) for board in data["boards"]] == [len(board.table) for board in found]


def check_figures(files: list[Path]) -> None:
    contents = {file.name: file.read_bytes() for file in files}
    assert {"leaderboard.csv", "leaderboard.html", "leaderboard.md", "leaderboard.tex"} <= contents.keys()
    for name, content in contents.items():
        if name.endswith(".svg"):
            ElementTree.fromstring(content)
        if name.endswith(".png"):
            assert content.startswith(b"\x89PNG")


def test_numbers_in_csv_stay_numbers(tmp_path):
    write_run(tmp_path, "-5", -12.5, 3, tasks=accuracies(**{"-a": -12.5, "=b": 1e300}))
    (board,), _ = leaderboard([tmp_path])
    table = pd.read_csv(io.StringIO(csv_of([board])))
    assert table["method"].tolist() == ["'-5"]
    assert (table["'-a"].tolist(), table["'=b"].tolist()) == ([-12.5], [1e300])
    assert np.issubdtype(table["'-a"].dtype, np.floating)
