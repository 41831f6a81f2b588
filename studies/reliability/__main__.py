"""The command line of the campaign; see the docstring of the package."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import; no attempt needs a hub

import torch

from fusion_bench_smile.io import write_atomically
from studies.reliability import __doc__ as description
from studies.reliability import (
    cache,
    concurrency,
    disks,
    kills,
    mutations,
    names,
    processes,
    readers,
    reports,
    svd,
)
from studies.reliability.report import others, page, table
from studies.reliability.runner import Part, Row, run_part

MODULES = (kills, readers, mutations, disks, names, svd, cache, processes, concurrency, reports)
PARTS: dict[str, Part] = {module.PART.name: module.PART for module in MODULES}


def run(chosen: Sequence[str], seed: int, scale: float, jobs: int) -> list[Row]:
    """Run the parts that are chosen, by their names or by those of single attempts; all of them if none is."""
    rows = []
    for part in PARTS.values():
        single = [name for name in chosen if name.startswith(f"{part.name}/")]
        if chosen and part.name not in chosen and not single:
            continue
        began = time.monotonic()
        only = None if part.name in chosen or not chosen else set(single)
        rows += run_part(part, seed, scale, jobs, lambda name, only=only: only is None or name in only)  # type: ignore[misc]
        print(f"{part.name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the campaign. Raises SystemExit with 1 if an attempt ended neither right nor with a clear error."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"parts ({', '.join(PARTS)}), or names of attempts")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random numbers (default: 0)")
    parser.add_argument("--scale", type=float, default=1.0, help="multiple of the number of attempts (default: 1)")
    parser.add_argument("--jobs", type=int, default=2, help="attempts at a time (default: 2)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table to a page")
    options = parser.parse_args(arguments)
    for unknown in (name for name in options.parts if name.split("/")[0] not in PARTS):
        parser.error(f"no part {unknown!r}; the parts are {', '.join(PARTS)}")
    logging.getLogger("fusion_bench_smile").setLevel(logging.ERROR)
    torch.set_num_threads(1)  # a fork would lack the other threads
    began = time.monotonic()
    rows = run(options.parts, options.seed, options.scale, options.jobs)
    if not rows:
        parser.error(f"no attempt is called {options.parts[0]!r}")
    print(table(rows), *others(rows), sep="\n")
    if options.output:
        command = shlex.join(["python", "-m", "studies.reliability", *(arguments or sys.argv[1:])])
        write_atomically(options.output, page(rows, command, options.seed, time.monotonic() - began))
    if others(rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
