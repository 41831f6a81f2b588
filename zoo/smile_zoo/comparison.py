"""Compare merging methods on the benchmarks of the zoo: every method through the framework, then one leaderboard.

python -m smile_zoo.comparison                      # images
python -m smile_zoo.comparison --benchmark text     # text
python -m smile_zoo.comparison --benchmark smollm2  # language

Runs that are complete in the folder already are skipped.
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
from math import prod
from pathlib import Path

from rich.console import Console

from fusion_bench_smile.leaderboard import leaderboard, show, write
from smile_zoo import images, smollm2, text
from smile_zoo.progress import shown_progress

MERGED = ("individual", "pretrained", "simple_average", "task_arithmetic", "ties_merging")


@dataclass(frozen=True)
class Benchmark:
    """The runs of a comparison.

    Attributes:
        name: of the benchmark.
        experiments: group of its configurations, ``experiment/<experiments>/<expert_set>``.
        expert_sets: sets of experts, each compared on its own.
        rows: configurations of the group ``smile_row`` without ranks.
        smile_rows: configurations of the group ``smile_row`` with values of gate_k and k, in Hydra's sweep syntax.
    """

    name: str
    experiments: str
    expert_sets: tuple[str, ...]
    rows: tuple[str, ...]
    smile_rows: tuple[tuple[str, str, str], ...]

    def commands(self, expert_set: str) -> list[list[str]]:
        """The framework's commands of one comparison; each is a sweep that runs its jobs one after the other."""
        common = ["fusion_bench", "-m", f"+experiment={self.experiments}/{expert_set}"]
        ranks = [[f"+smile_row={rows}", f"++method.gate_k={g}", f"++method.k={k}"] for rows, g, k in self.smile_rows]
        return [[*common, *options] for options in ([f"+smile_row={','.join(self.rows)}"], *ranks)]

    def num_jobs(self, expert_set: str) -> int:
        """The number of jobs of these commands: the product of the lengths of the lists that each sweeps over."""
        return sum(prod(option.count(",") + 1 for option in command) for command in self.commands(expert_set))


IMAGES = Benchmark(
    "images", "smile_embedded", images.STRENGTHS, (*MERGED, "fisher", "regmean", "adamerging"),
    (("smile_framework,smile", "16", "8,16"), ("smile_two_pass,smile_calibrated", "16", "16")),
)  # fmt: skip
TEXT = Benchmark("text", "smile_text", text.KINDS, MERGED, (("smile_framework,smile", "8", "8"), ("smile", "16", "16")))
SMOLLM2 = Benchmark(
    "smollm2", "smile_smollm2", smollm2.KINDS, MERGED,
    (("smile_framework,smile,smile_two_pass,smile_calibrated", "8", "8"), ("smile", "16", "16")),
)  # fmt: skip
BENCHMARKS = {benchmark.name: benchmark for benchmark in (IMAGES, TEXT, SMOLLM2)}


def run(benchmark: Benchmark, expert_set: str, folder: Path, threads: int) -> None:
    """Run the commands of one set of experts in `folder`, each with `threads` CPU threads.

    Raises:
        RuntimeError: if a command fails; the message holds the end of its output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    program = str(Path(sys.executable).with_name("fusion_bench"))
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    for number, command in enumerate(benchmark.commands(expert_set)):
        log_file = folder / f"{benchmark.name}-{expert_set}-{number}.log"
        with log_file.open("w") as output:
            process = subprocess.run(
                [program, *command[1:]],
                cwd=folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed; the end of {log_file}:\n{log_file.read_text()[-2000:]}")


def run_all(benchmark: Benchmark, expert_sets: Sequence[str], folder: Path) -> None:
    """Run the sets of experts concurrently; they divide the CPU cores, because small models gain little by threads.

    Raises:
        RuntimeError: see `run`.
    """
    threads = max(1, (os.cpu_count() or 1) // len(expert_sets))
    with ThreadPoolExecutor() as executor:
        list(executor.map(lambda expert_set: run(benchmark, expert_set, folder, threads), expert_sets))


def parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--folder", type=Path, default=Path("demo"), help="folder of all outputs (default: demo)")
    options.add_argument("--benchmark", choices=BENCHMARKS, default="images", help="(default: images)")
    options.add_argument("--only", metavar="SET", help="one set of experts only: gentle, strong; full, lora")
    return options


def main() -> None:
    """Run the comparison of the command line, print the leaderboard and write it to ``FOLDER/leaderboard``."""
    started = time.perf_counter()
    options = parser()
    arguments = options.parse_args()
    benchmark = BENCHMARKS[arguments.benchmark]
    if arguments.only not in (None, *benchmark.expert_sets):
        names = ", ".join(benchmark.expert_sets)
        options.error(f"--only {arguments.only}: the {benchmark.name} benchmark has {names}")
    expert_sets = [arguments.only] if arguments.only else list(benchmark.expert_sets)
    for command in (command for expert_set in expert_sets for command in benchmark.commands(expert_set)):
        Console(stderr=True).print(f"[dim]$ {' '.join(command)}[/dim]", soft_wrap=True, highlight=False)
    total = sum(benchmark.num_jobs(expert_set) for expert_set in expert_sets)
    try:
        with shown_progress(arguments.folder / "outputs", total, Console(stderr=True)):
            run_all(benchmark, expert_sets, arguments.folder)
    except RuntimeError as error:
        raise SystemExit(str(error)) from None
    boards, skipped = leaderboard([arguments.folder / "outputs"], benchmarks=[f"embedded {benchmark.name}*"])
    show(boards, "table", Console())
    for file in write(boards, arguments.folder / "leaderboard", skipped, f"The embedded benchmark: {benchmark.name}"):
        print(file)
    print(f"{time.perf_counter() - started:.0f} seconds")


if __name__ == "__main__":
    main()
