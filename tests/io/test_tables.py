"""Markdown tables."""

from __future__ import annotations

import pandas as pd

from fusion_bench_smile.io import markdown_table


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
