"""The command of the study; see the package's text."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from . import __doc__ as description
from .measure import measure
from .report import SETS, write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the experts lie, and the measurements go")
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"which experts to measure: {', '.join(SETS)}")
    parser.add_argument("--report", type=Path, metavar="DOCS", help="write tables and the figure of what is there")
    arguments = parser.parse_args()
    for unknown in (name for name in arguments.sets if name not in SETS):
        parser.error(f"there is no set {unknown!r} of experts, only {', '.join(SETS)}")
    if not arguments.folder.is_dir():
        parser.error(f"{arguments.folder} is no folder: make it with fusion_bench_smile.embedded.build.seeds")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger(__package__).setLevel(logging.INFO)
    for chosen in arguments.sets:
        measure(arguments.folder, chosen)
    if arguments.report:
        write_report(arguments.folder / "beyond", arguments.report)


if __name__ == "__main__":
    main()
