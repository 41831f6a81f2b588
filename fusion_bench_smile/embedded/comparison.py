"""The main job of the embedded benchmarks: run every method through the framework, then one leaderboard.

python -m fusion_bench_smile.embedded.comparison                   # the images: runs everything, prints and draws it
python -m fusion_bench_smile.embedded.comparison --benchmark text  # the texts instead

What lies in the folder already, complete, is not run again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..leaderboard import leaderboard, write
from ..leaderboard.command import show
from . import STRENGTHS, text

MERGED = ("individual", "pretrained", "simple_average", "task_arithmetic", "ties_merging")


@dataclass(frozen=True)
class Benchmark:
    """An embedded benchmark, as the comparison runs it.

    Attributes:
        experiments: the configurations' group, ``experiment/<experiments>/<set>``.
        rows: of the group ``smile_row``.
        smiles: rows of SMILE with values of gate_k and k, as Hydra's sweeps take them.
    """

    name: str
    experiments: str
    sets: tuple[str, ...]
    rows: tuple[str, ...]
    smiles: tuple[tuple[str, str, str], ...]

    def commands(self, chosen: str) -> list[list[str]]:
        """The framework's own commands that make one comparison: each runs its jobs one after the other."""
        common = ["fusion_bench", "-m", f"+experiment={self.experiments}/{chosen}"]
        smiles = [[f"+smile_row={rows}", f"++method.gate_k={g}", f"++method.k={k}"] for rows, g, k in self.smiles]
        return [[*common, *options] for options in ([f"+smile_row={','.join(self.rows)}"], *smiles)]


IMAGES = Benchmark(
    "images", "smile_embedded", STRENGTHS, (*MERGED, "fisher", "regmean", "adamerging"),
    (("smile_framework,smile", "16", "8,16"), ("smile_two_pass,smile_calibrated", "16", "16")),
)  # fmt: skip
TEXT = Benchmark("text", "smile_text", text.KINDS, MERGED, (("smile_framework,smile", "8", "8"), ("smile", "16", "16")))
BENCHMARKS = {benchmark.name: benchmark for benchmark in (IMAGES, TEXT)}


def run(benchmark: Benchmark, chosen: str, folder: Path, threads: int) -> None:
    """Run the commands of one set of experts in `folder`, with `threads` CPU threads.

    Raises:
        RuntimeError: if one of them fails; it shows the end of its output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    program = str(Path(sys.executable).with_name("fusion_bench"))
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    for number, command in enumerate(benchmark.commands(chosen)):
        log_file = folder / f"{benchmark.name}-{chosen}-{number}.log"
        Console(stderr=True).print(f"[dim]$ {' '.join(command)}[/dim]", soft_wrap=True, highlight=False)
        with log_file.open("w") as output:
            done = subprocess.run(
                [program, *command[1:]],
                cwd=folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed; the end of {log_file}:\n{log_file.read_text()[-2000:]}")


def run_all(benchmark: Benchmark, sets: Sequence[str], folder: Path) -> None:
    """Run the sets of experts side by side, each with its share of the CPU: small models gain little by threads."""
    threads = max(1, (os.cpu_count() or 1) // len(sets))
    with ThreadPoolExecutor() as workers:
        for _ in workers.map(lambda chosen: run(benchmark, chosen, folder, threads), sets):
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where everything goes (default: demo)")
    parser.add_argument("--benchmark", choices=BENCHMARKS, default="images", help="(default: images)")
    parser.add_argument("--only", metavar="SET", help="one set of experts only: gentle, strong; full, lora")
    arguments = parser.parse_args()
    started = time.perf_counter()
    benchmark = BENCHMARKS[arguments.benchmark]
    if arguments.only not in (None, *benchmark.sets):
        parser.error(f"--only {arguments.only}: the {benchmark.name} benchmark has {', '.join(benchmark.sets)}")
    sets = [arguments.only] if arguments.only else benchmark.sets
    try:
        run_all(benchmark, sets, arguments.folder)
    except RuntimeError as error:
        raise SystemExit(str(error)) from None
    boards, skipped = leaderboard([arguments.folder / "outputs"], benchmarks=[f"embedded {benchmark.name}*"])
    show(boards, "table", Console())
    for file in write(boards, arguments.folder / "leaderboard", skipped, f"The embedded benchmark: {benchmark.name}"):
        print(file)
    print(f"{time.perf_counter() - started:.0f} seconds")


if __name__ == "__main__":
    main()
