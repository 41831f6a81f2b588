"""``smile-leaderboard``: gather run folders into tables, pictures and a page.

smile-leaderboard outputs                                  # a table in the terminal
smile-leaderboard outputs --output leaderboard             # and Markdown, CSV, LaTeX, pictures, and a web page
smile-leaderboard outputs --where "parameters < 1.5" --sort retention --format markdown
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from rich.console import Console

from ..errors import SmileError
from . import figures, tables
from .boards import Board, arrange, boards
from .gather import Gathered, Skipped, gather
from .page import page

FORMATS = ("table", "markdown", "csv", "latex")


def leaderboard(
    folders: Iterable[str | os.PathLike[str]],
    *,
    benchmarks: Sequence[str] = (),
    methods: Sequence[str] = (),
    where: str | None = None,
    sort: str = "average",
    published: bool = True,
) -> tuple[list[Board], list[Skipped]]:
    """The boards of all runs in some folders, and what could not be used.

    Args:
        benchmarks: patterns of the benchmarks to keep; none keeps all.
        methods, where, sort: see `arrange`.
        published: show published results beside the measured ones.

    Raises:
        SmileError: if a folder doesn't exist, a column or condition is wrong, or nothing is left.
    """
    found = gather(folders)
    chosen = [
        arrange(board, sort, methods, where)
        for board in boards(found.runs, published)
        if not benchmarks or any(fnmatch(board.benchmark, pattern) for pattern in benchmarks)
    ]
    kept = [board for board in chosen if len(board.measured)]
    if not kept:
        raise SmileError(_nothing(found))
    return kept, found.skipped


def write(
    all_boards: Sequence[Board],
    folder: str | os.PathLike[str],
    skipped: Sequence[Skipped] = (),
    title: str = "Leaderboard",
) -> list[Path]:
    """Write tables, pictures (PNG and SVG) and the page into a folder; each file is complete or not there.

    Returns:
        The files.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    drawn = [board for board in all_boards if figures.has_ratios(board)]
    with tempfile.TemporaryDirectory(dir=target, prefix=".writing") as name:
        scratch = Path(name)
        (scratch / "leaderboard.md").write_text("\n".join(tables.markdown(board) for board in all_boards))
        (scratch / "leaderboard.csv").write_text(tables.csv(list(all_boards)))
        (scratch / "leaderboard.tex").write_text("\n".join(tables.latex(board) for board in all_boards))
        (scratch / "leaderboard.html").write_text(page(all_boards, skipped, title))
        if drawn:
            figures.save(figures.scatter(drawn), scratch / "retention")
        for number, board in enumerate(all_boards):
            ending = f"-{number + 1}" if len(all_boards) > 1 else ""
            figures.save(figures.task_bars(board), scratch / f"tasks{ending}")
            if not figures.rank_grid(board).empty:
                figures.save(figures.heat_maps(board), scratch / f"ranks{ending}")
        files = sorted(scratch.iterdir())
        for file in files:
            os.replace(file, target / file.name)
    return [target / file.name for file in files]


def show(all_boards: Sequence[Board], form: str, console: Console) -> None:
    """Print the boards in one of `FORMATS`."""
    if form == "csv":
        print(tables.csv(list(all_boards)), end="")
        return
    for board in all_boards:
        if form == "table":
            _print_table(board, console)
        else:
            print(tables.markdown(board) if form == "markdown" else tables.latex(board))


def _print_table(board: Board, console: Console) -> None:
    table = tables.rich_table(board)
    width = console.measure(table, options=console.options.update(width=10_000)).maximum
    if console.is_terminal and width > console.width:
        console.print(tables.rich_table(board, tasks=False))
    else:
        Console(width=max(width, console.width)).print(table)


def _nothing(found: Gathered) -> str:
    skipped = "".join(f"\n  {run.folder}: {run.reason}" for run in found.skipped[:20])
    return f"no run is left to show: {len(found.runs)} complete runs before filtering" + skipped


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("folders", nargs="+", metavar="FOLDER", help="run folders, or folders that hold some")
    made.add_argument("--output", type=Path, help="a folder for tables, pictures and page")
    made.add_argument("--format", choices=FORMATS, default="table", help="what is printed (default: table)")
    made.add_argument("--sort", default="average", metavar="COLUMN", help="(default: average)")
    made.add_argument("--benchmark", action="append", default=[], metavar="PATTERN", help="only these, e.g. '*gentle*'")
    made.add_argument("--method", action="append", default=[], metavar="PATTERN", help="only these, e.g. 'SMILE*'")
    made.add_argument("--where", metavar="CONDITION", help="on columns, e.g. 'parameters < 1.5 and gate_k == 16'")
    made.add_argument("--no-published", action="store_true", help="leave the published results out")
    made.add_argument("--title", default="Leaderboard", help="of the page")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = parser().parse_args(arguments)
    notes = Console(stderr=True, highlight=False)
    try:
        found, skipped = leaderboard(
            chosen.folders,
            benchmarks=chosen.benchmark,
            methods=chosen.method,
            where=chosen.where,
            sort=chosen.sort,
            published=not chosen.no_published,
        )
        show(found, chosen.format, Console())
        written = write(found, chosen.output, skipped, chosen.title) if chosen.output else []
    except (SmileError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    if skipped:
        notes.print(f"{len(skipped)} left out:", markup=False)
    for run in skipped:
        notes.print(f"  {run.folder}: {run.reason}", markup=False, soft_wrap=True)
    for file in written:
        notes.print(f"written: {file}", markup=False, soft_wrap=True)
