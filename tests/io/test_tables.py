"""Markdown tables, and any text in them as GitHub shows it."""

from __future__ import annotations

from itertools import pairwise

import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from fusion_bench_smile.io import markdown_table
from fusion_bench_smile.io.tables import escape_markdown
from fusion_bench_smile.io.text import printable


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split(" | ")]


def test_numbers_are_rounded_and_strings_kept():
    frame = pd.DataFrame({"ratio": [1.2345, None], "count": [7, 12], "text": ["1e5", "**2.50**"]}, index=["a", "b"])
    head, rule, *rows = markdown_table(frame, {"ratio": 3, "count": 0}, index=True).splitlines()
    assert cells(head) == ["", "ratio", "count", "text"]
    assert [(part[0], part[-1]) for part in rule.strip("|").split("|")] == [(":", "-"), *[("-", ":")] * 3]
    assert [cells(row) for row in rows] == [["a", "1.234", "7", "1e5"], ["b", "", "12", "**2.50**"]]


def test_the_index_is_left_out_by_default():
    frame = pd.DataFrame({"method": ["one", "two"], "average": [70.0, 66.66]})
    assert [cells(row) for row in markdown_table(frame).splitlines()[2:]] == [["one", "70.0"], ["two", "66.7"]]


def test_separators_are_escaped():
    frame = pd.DataFrame({"method": ["‖a|b‖"], "|x|": [1.0]}, index=pd.Index(["c|d"], name="e|f"))
    assert cells(markdown_table(frame).splitlines()[2]) == [r"‖a\|b‖", "1.0"]
    head, _, row = markdown_table(frame, index=True).splitlines()
    assert cells(head) == [r"e\|f", "method", r"\|x\|"]
    assert cells(row) == [r"c\|d", r"‖a\|b‖", "1.0"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("SMILE (gate_k=4, λ=0.3) †", "SMILE (gate_k=4, λ=0.3) †"),
        ("a\nb\tc\x00", r"a\nb\tc\x00"),
        ("\u202eright to left\u2028", r"\u202eright to left\u2028"),
        ("\ud800", r"\ud800"),
        ("98\xa0%", "98 %"),
        (10**400, "1" + 198 * "0" + "…"),
        (None, "None"),
    ],
)
def test_text_in_one_line(text, line):
    assert printable(text) == line


@given(st.text(), st.integers(1, 40))
def test_printable_text(text, limit):
    line = printable(text, limit)
    assert line.isprintable()
    assert len(line) <= limit
    assert printable(line, limit) == line


MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
OPENERS = ("th_open", "td_open", "heading_open")


def shown(markdown: str) -> list[str]:
    """The text of the cells and headings, in which nothing is formatted, linked or taken for HTML."""
    tokens = MARKDOWN.parse(markdown)
    parts = [part for opener, part in pairwise(tokens) if opener.type in OPENERS]
    assert len(parts) == sum(token.type == "inline" for token in tokens)
    assert {child.type for part in parts for child in part.children} <= {"text"}
    return ["".join(child.content for child in part.children) for part in parts]


MARKUP = st.text("*_`~[]()!<>&|\\$#:/-+=.w ab1\n", max_size=12)


@given(st.text() | MARKUP, st.text() | MARKUP)
@example("![x](https://example.org/x.png)", "<img src=x onerror=alert(1)>")
@example("a|b`c", "`a|b` \\|")
@example("__init__", "&lt; &#124;")
@example("https://example.org", "www.example.org")
def test_text_is_shown_as_it_is(cell, title):
    table = markdown_table(pd.DataFrame({"x": [escape_markdown(cell), "last"]}))
    heading = f"## {escape_markdown(title)}"
    assert len(table.splitlines()) == 4
    assert shown(f"{heading}\n\n{table}\n") == [
        " ".join(part.split(" ")).strip(" ") for part in (printable(title), "x", printable(cell), "last")
    ]
    assert "http://" not in heading
    assert "https://" not in heading + table
    assert "www." not in heading + table


def test_usual_names_are_readable_in_the_source():
    for text in ("SMILE (gate_k=4, k=8, ≤1.25×)", "layers.0.fc1_weight", "fusion-bench-smile 0.1.0", "‖Δ‖² 3.5 %"):
        assert escape_markdown(text) == text


def test_line_breaks_stay_in_their_cell():
    frame = pd.DataFrame({"a\nb": ["c\r\nd"]}, index=pd.Index(["e\u2028f"], name="g\vh"))
    head, _, row = markdown_table(frame, index=True).splitlines()
    assert (cells(head), cells(row)) == (["g h", "a b"], ["e f", "c d"])
