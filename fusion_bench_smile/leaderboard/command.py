"""The command ``smile-leaderboard``: tables, figures and a web page from the folders of runs.

smile-leaderboard outputs                                  # print a table
smile-leaderboard outputs --output leaderboard             # also write Markdown, CSV, LaTeX, figures and a web page
smile-leaderboard outputs --where "parameters < 1.5" --sort retention --format markdown
"""

import argparse
import os
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

from ..exceptions import SmileError
from ..io import write_atomically
from ..reports import render_figure
from . import figures, tables
from .boards import Board, Skipped, arrange, boards, gather

FORMATS = ("table", "markdown", "csv", "latex")


def leaderboard(
    folders: Iterable[str | os.PathLike[str]], *, benchmarks: Sequence[str] = (), methods: Sequence[str] = (),
    where: str | None = None, sort: str = "average", published: bool = True,
) -> tuple[list[Board], list[Skipped]]:  # fmt: skip
    """The boards of all runs in some folders and their subfolders, and the runs that are left out.

    Args:
        benchmarks: Glob patterns of the benchmarks to keep; an empty sequence keeps all.
        methods, where, sort: As for `arrange`.
        published: Whether published results are shown beside the measured ones.

    Raises:
        SmileError: For a missing folder, an unknown column, an invalid condition, or if no run is left.
    """
    gathered = gather(folders)
    arranged = [
        arrange(board, sort, methods, where)
        for board in boards(gathered.runs, published)
        if not benchmarks or any(fnmatch(board.benchmark, pattern) for pattern in benchmarks)
    ]
    kept = [board for board in arranged if len(board.measured)]
    if not kept:
        skipped = "".join(f"\n  {run}" for run in gathered.skipped[:20])
        raise SmileError(f"no run is left to show: {len(gathered.runs)} complete runs before filtering{skipped}")
    return kept, gathered.skipped


def write(
    all_boards: Sequence[Board], folder: str | os.PathLike[str], skipped: Sequence[Skipped] = (),
    title: str = "Leaderboard",
) -> list[Path]:  # fmt: skip
    """Write tables, figures (PNG and SVG) and the web page into a folder, created if missing.

    All contents are rendered first, then each file is written atomically. The files are returned, sorted by name.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    contents: dict[str, str | bytes] = {
        "leaderboard.md": "\n".join(tables.markdown(board) for board in all_boards),
        "leaderboard.csv": tables.csv(list(all_boards)),
        "leaderboard.tex": "\n".join(tables.latex(board) for board in all_boards),
        "leaderboard.html": tables.page(all_boards, skipped, title),
    }
    for name, figure in _figures(all_boards).items():
        contents |= {f"{name}.{suffix}": content for suffix, content in render_figure(figure).items()}
    for name, content in contents.items():
        write_atomically(target / name, content)
    return sorted(target / name for name in contents)


def show(all_boards: Sequence[Board], output_format: str, console: Console) -> None:
    """Print boards to standard output in one of `FORMATS`.

    A table that is wider than the terminal leaves out the columns of single tasks.
    """
    if output_format == "csv":
        print(tables.csv(list(all_boards)), end="")
        return
    for board in all_boards:
        if output_format != "table":
            print(tables.markdown(board) if output_format == "markdown" else tables.latex(board))
            continue
        table = tables.rich_table(board)
        width = console.measure(table, options=console.options.update(width=10_000)).maximum
        if console.is_terminal and width > console.width:
            console.print(tables.rich_table(board, tasks=False))
        else:
            Console(width=max(width, console.width)).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with the arguments of the command line.

    Raises SystemExit with the error message, for a `SmileError` or `OSError`.
    """
    options = _parser().parse_args(arguments)
    try:
        found, skipped = leaderboard(
            options.folders, benchmarks=options.benchmark, methods=options.method, where=options.where,
            sort=options.sort, published=not options.no_published,
        )  # fmt: skip
        show(found, options.format, Console())
        files = write(found, options.output, skipped, options.title) if options.output else []
    except (SmileError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    left_out = [f"{len(skipped)} left out:"] if skipped else []
    left_out += [f"  {run}" for run in skipped]
    for line in [*left_out, *(f"written: {file}" for file in files)]:
        Console(stderr=True, highlight=False).print(line, markup=False, emoji=False, soft_wrap=True)


def _figures(all_boards: Sequence[Board]) -> dict[str, Figure]:
    """File name without suffix → figure; the figures of several boards are numbered."""
    named = {}
    if with_ratios := [board for board in all_boards if figures.has_ratios(board)]:
        named["retention"] = figures.scatter(with_ratios)
    for number, board in enumerate(all_boards, start=1):
        suffix = f"-{number}" if len(all_boards) > 1 else ""
        named[f"tasks{suffix}"] = figures.task_bars(board)
        if not figures.rank_grid(board).empty:
            named[f"ranks{suffix}"] = figures.rank_heatmaps(board)
    return named


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="folders of runs, searched with their subfolders")
    parser.add_argument("--output", type=Path, help="folder for tables, figures and the web page")
    parser.add_argument("--format", choices=FORMATS, default="table", help="format of the output (default: table)")
    parser.add_argument("--sort", default="average", metavar="COLUMN", help="column to sort by (default: average)")
    for name, example in (("benchmark", "*gentle*"), ("method", "SMILE*")):
        keep = f"keep these {name}s, e.g. '{example}'"
        parser.add_argument(f"--{name}", action="append", default=[], metavar="PATTERN", help=keep)
    condition = "condition on columns, e.g. 'parameters < 1.5 and gate_k == 16'"
    parser.add_argument("--where", metavar="CONDITION", help=condition)
    parser.add_argument("--no-published", action="store_true", help="leave out published results")
    parser.add_argument("--title", default="Leaderboard", help="title of the web page (default: Leaderboard)")
    return parser
