"""The command line of the study; see the docstring of the package."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from studies.routing import __doc__ as description
from studies.routing.measure import measure
from studies.routing.report import write_report
from studies.routing.stored_tables import EXPERT_SETS, tables_folder


def main() -> None:
    """Measure the sets of experts of the command line, and write the report."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the experts; the measurements are written into it too")
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"sets of experts to measure: {', '.join(EXPERT_SETS)}")
    parser.add_argument("--report", type=Path, metavar="DOCS", help="write tables and figures of the measurements")
    arguments = parser.parse_args()
    for unknown in (name for name in arguments.sets if name not in EXPERT_SETS):
        parser.error(f"no set {unknown!r} of experts; the sets are {', '.join(EXPERT_SETS)}")
    if not arguments.folder.is_dir():
        parser.error(f"{arguments.folder} is no folder: create it with recipes.images.seeds")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger(__package__).setLevel(logging.INFO)
    for expert_set in arguments.sets:
        measure(arguments.folder, expert_set)
    if arguments.report:
        write_report(tables_folder(arguments.folder), arguments.report)


if __name__ == "__main__":
    main()
