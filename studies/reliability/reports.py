"""Reports: hostile reports of runs in a leaderboard, and hostile texts in model cards."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from fusion_bench_smile import load, save
from fusion_bench_smile.leaderboard import leaderboard
from fusion_bench_smile.reports import REPORT_FILE, RunReport
from studies.reliability.damage import damaged_json, damaged_text
from studies.reliability.models import upscaled_tower
from studies.reliability.mutations import CONFIG, SECTION
from studies.reliability.outcomes import Outcome, check, combined, judge
from studies.reliability.run_reports import leaderboard_command, report_values
from studies.reliability.runner import Case, Part, Trial

GOOD, CARD = "good run", "README.md"
COMMAND = "pip install foreign-package"
TEXTS = (
    "[/red]", "[bold]x[/bold]", ":smile:", "$\\frac{$", "_hidden", "", " ", "\0", "a\nb", "a\rb", "\t=1+1", "\ud800",
    '=HYPERLINK("http://example.org")', "+1", "-1", "@SUM(A1)", "a|b", "`x`", "![x](y)", "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>", "\\", '"quoted", text', "x" * 100_000, "\u202eabc", "method", "average",
    "benchmark", "folder", "origin", "kind", "retention", "self", "__proto__", "memory (MB)", "a", "$(reboot)", "NaN",
)  # fmt: skip
NUMBERS = (0, -1, 1e308, -1e308, 1e-320, float("nan"), float("inf"), 10**400, 2**63, True, None, "1", [1], "x")
FORMULA = re.compile(r"^[=+\-@\t\r]")
NUMBER = re.compile(r"^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$", re.IGNORECASE)
ROW = re.compile(r"(?<!\\)\|")


class Prepared:
    """The folder of a good run, what the leaderboard shows of it, and a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.runs, self.checkpoint = folder / "runs", folder / "checkpoint"
        RunReport.model_validate(report_values(GOOD)).write(self.runs / "good")
        self.command = leaderboard_command()
        self.row = _row(self.runs)
        save(upscaled_tower(), self.checkpoint)


def hostile_texts(prepared: Prepared, case: Case) -> Iterator[Outcome]:
    """A valid report with hostile texts and numbers in some of its values."""
    values = report_values("odd")
    for _ in range(case.random.choice((1, 1, 2, 4))):
        case.random.choice(CHANGES)(values, case.random)
    yield _show(prepared, case, json.dumps(values).encode())


def damaged_reports(prepared: Prepared, case: Case) -> Iterator[Outcome]:
    """A report whose JSON is damaged."""
    content = damaged_json(case.random, report_values("odd"))
    yield _show(prepared, case, damaged_text(case.random, content) if case.random.random() < 0.2 else content)


def figures(prepared: Prepared, case: Case) -> Iterator[Outcome]:
    """The figures and the page of a hostile report."""
    values = report_values("odd")
    for _ in range(case.random.choice((1, 2, 4))):
        case.random.choice(CHANGES)(values, case.random)
    runs, output = _runs_with(prepared, case, json.dumps(values).encode()), case.folder / "output"

    def examine(_: str) -> Outcome:
        page = (output / "leaderboard.html").read_text(encoding="utf-8")
        return check(GOOD in page and "<script>alert" not in page and "<img" not in page, "the page holds foreign HTML")

    yield judge(lambda: _call(prepared, runs, "--output", str(output)), examine, allowed=(SystemExit,))


def model_cards(prepared: Prepared, case: Case) -> Iterator[Outcome]:
    """Hostile texts of a checkpoint in the card of the model when it is saved again."""
    path, text = case.folder / "model", case.random.choice(TEXTS)
    shutil.copytree(prepared.checkpoint, path)
    (path / CARD).unlink()
    config = json.loads((path / CONFIG).read_text())
    section, kind = (
        config[SECTION],
        case.random.choice(("expert", "needs", "versions", "sources", "largest", "modules")),
    )
    _put_into_section(section, kind, text)
    (path / CONFIG).write_text(json.dumps(config))

    def examine(_: None) -> Outcome:
        card = (case.folder / "again" / CARD).read_text(encoding="utf-8")
        return combined([
            check("<script" not in card and "<img" not in card, "the card holds foreign HTML"),
            check(COMMAND not in card, "the card prints the text of a checkpoint as a command"),
            check_rows(card),
        ])  # fmt: skip

    yield judge(lambda: save(load(path), case.folder / "again"), examine)


def _put_into_section(section: dict[str, Any], kind: str, text: str) -> None:
    recipe, (first, *others) = section["recipe"], section["experts"]
    if kind == "expert":
        section["experts"] = [text, *others]
        for key in ("sources", "changes"):
            recipe[key] = {text if name == first else name: value for name, value in recipe[key].items()}
    elif kind == "needs":
        section["needs"] = f"{text} {COMMAND}"
    elif kind == "largest":
        recipe["changes"][first]["largest"] = {text: recipe["changes"][first]["energy"] / 2}
    elif kind == "modules":
        section["options"]["exclude_modules"] = [text]
    else:
        recipe[kind][text if kind == "versions" else first] = text


# -- the leaderboard


def _show(prepared: Prepared, case: Case, report: bytes) -> Outcome:
    """Right if the good run is shown as without the odd report, in one of the formats."""
    runs = _runs_with(prepared, case, report)
    row = judge(lambda: _row(runs), lambda row: check(row == prepared.row, "the row of another run changed"))
    name = case.random.choice([*FORMATS])
    shown = judge(partial(_call, prepared, runs, "--format", name), FORMATS[name], allowed=(SystemExit,))
    return combined([row, shown])


def _runs_with(prepared: Prepared, case: Case, report: bytes) -> Path:
    runs = Path(shutil.copytree(prepared.runs, case.folder / "runs"))
    (runs / "odd").mkdir()
    (runs / "odd" / REPORT_FILE).write_bytes(report)
    return runs


def _row(runs: Path) -> dict[str, Any]:
    """What the leaderboard says of the good run, but for its retention, which depends on individual models."""
    boards, _ = leaderboard([runs])
    (row,) = (row for board in boards for row in board.table.to_dict("records") if row["method"] == GOOD)
    return {key: str(row[key]) for key in ("a", "b", "average", "parameters", "seconds", "gate_k", "k", "device")}


def _call(prepared: Prepared, runs: Path, *arguments: str) -> str:
    """The output of the command."""
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(io.StringIO()):
        prepared.command([str(runs), *arguments])
    output.getvalue().encode("utf-8")  # a terminal does the same
    return output.getvalue()


def check_csv(text: str) -> Outcome:
    """Right if all rows have as many cells, one is that of the good run, and no cell is a formula."""
    rows = list(csv.reader(io.StringIO(text)))
    formulas = [cell for row in rows for cell in row if FORMULA.match(cell) and not NUMBER.match(cell)]
    return combined([
        check(len({len(row) for row in rows}) == 1, "rows of other lengths"),
        check(any(GOOD in row for row in rows), "the good run is missing"),
        check(not formulas, f"formulas: {formulas[:1]}"),
    ])  # fmt: skip


def _check_markdown(text: str) -> Outcome:
    html = check("<script" not in text and "<img" not in text, "foreign HTML")
    return combined([check(GOOD in text, "the good run is missing"), html, check_rows(text)])


def check_rows(text: str) -> Outcome:
    """Right if each row of a Markdown table has as many cells as the row above it."""
    lines = [*text.split("\n"), ""]
    counts = [len(ROW.findall(line)) if line.startswith("|") else 0 for line in lines]
    broken = [here for above, here in pairwise(counts) if above and here and above != here]
    return check(not broken, "a broken row of a table")


def _check_text(text: str) -> Outcome:
    return check(GOOD in text or "good" in text, "the good run is missing")


FORMATS: dict[str, Callable[[str], Outcome]] = {
    "table": _check_text, "markdown": _check_markdown, "csv": check_csv, "latex": _check_text,
}  # fmt: skip


def _change_text(values: dict[str, Any], random: Random) -> None:
    key = random.choice(
        ("label", "benchmark", "modelpool", "taskpool", "fingerprint", "error", "kind", "status", "environment")
    )
    text = random.choice(TEXTS)
    if key == "environment":
        values[key] = {**values[key], "accelerator": text, "packages": {text: text}}
    else:
        values[key] = (
            text if key not in ("kind", "status") else random.choice(("individual", "failed", "complete", text))
        )


def _change_task(values: dict[str, Any], random: Random) -> None:
    score = random.choice((50.0, *NUMBERS))
    task = {"metric": random.choice(("accuracy", *TEXTS)), "score": score, "samples": random.choice((10, *NUMBERS))}
    values["tasks"] = {**(values["tasks"] if random.random() < 0.7 else {}), random.choice(TEXTS): task}


def _change_method(values: dict[str, Any], random: Random) -> None:
    values["method"] = {**values["method"], random.choice(("top_k", "k", "gate_k", *TEXTS)): random.choice(NUMBERS)}


def _change_number(values: dict[str, Any], random: Random) -> None:
    key = random.choice(
        ("parameters", "pretrained_parameters", "bytes", "pretrained_bytes", "average", "retention", "seed")
    )
    values[key] = random.choice(NUMBERS)


def _change_time(values: dict[str, Any], random: Random) -> None:
    key = random.choice(("started", "finished"))
    values[key] = random.choice(
        ("2026-01-01T00:00:00", "9999-12-31T23:59:59-12:00", "0001-01-01T00:00:00Z", 0, 1e300, "x")
    )


CHANGES: tuple[Callable[[dict[str, Any], Random], None], ...] = (
    _change_text, _change_text, _change_task, _change_method, _change_number, _change_time
)  # fmt: skip
PART = Part("reports", Prepared, {
    "hostile texts and numbers": Trial(hostile_texts, 600), "damaged JSON": Trial(damaged_reports, 400),
    "figures and page": Trial(figures, 20), "model cards": Trial(model_cards, 200),
})  # fmt: skip
