"""Compare merging methods on the benchmarks of the zoo: every method through the framework, then one leaderboard.

python -m smile_zoo.comparison                       # DINOv2 on eight image tasks
python -m smile_zoo.comparison --only fourteen       # on fourteen
python -m smile_zoo.comparison --benchmark text      # a sentence encoder
python -m smile_zoo.comparison --benchmark smollm2   # a language model
python -m smile_zoo.comparison --benchmark embedded  # the small CLIP

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
from math import prod, sqrt
from pathlib import Path

from rich.console import Console

from fusion_bench_smile.leaderboard import leaderboard, show, write
from fusion_bench_smile.reports import REPORT_FILE, RunReport
from smile_zoo import images, smollm2, text
from smile_zoo.progress import shown_progress

MERGED = ("individual", "pretrained", "simple_average", "task_arithmetic", "ties_merging")


@dataclass(frozen=True)
class Benchmark:
    """The runs of a comparison.

    Attributes:
        name: of the benchmark in reports, a glob pattern.
        experiments: group of its configurations, ``experiment/<experiments>/<expert_set>``.
        expert_sets: sets of experts, each compared on its own.
        default_sets: those that a comparison runs by default.
        rows: configurations of the group ``smile_row`` without ranks.
        sweeps: further configurations, each with further overrides, in Hydra's sweep syntax; they run concurrently.
        overrides: of all jobs.
    """

    name: str
    experiments: str
    expert_sets: tuple[str, ...]
    default_sets: tuple[str, ...]
    rows: tuple[str, ...]
    sweeps: tuple[tuple[str, ...], ...]
    overrides: tuple[str, ...] = ()

    def commands(self, expert_set: str) -> list[list[str]]:
        """The framework's commands of one comparison; each is a sweep that runs its jobs one after the other."""
        common = ["fusion_bench", "-m", f"+experiment={self.experiments}/{expert_set}"]
        all_sweeps = ((",".join(self.rows),), *self.sweeps)
        return [[*common, f"+smile_row={rows}", *overrides, *self.overrides] for rows, *overrides in all_sweeps]

    def num_jobs(self, expert_set: str) -> int:
        """The number of jobs of these commands: the product of the lengths of the lists that each sweeps over."""
        return sum(prod(option.count(",") + 1 for option in command) for command in self.commands(expert_set))


def ranks(gate_k: str, k: str, *overrides: str) -> tuple[str, ...]:
    """Overrides of the ranks of router and experts, and further ones."""
    return (f"++method.gate_k={gate_k}", f"++method.k={k}", *overrides)


DINOV2 = Benchmark(
    "DINOv2-small*", "smile_dinov2", ("eight", "fourteen"), ("eight",),
    MERGED,
    (("backbone_regmean,backbone_adamerging",), ("smile_framework,smile", *ranks("16", "32")),
     ("smile_input", *ranks("null", "32", "++method.storage=int4"))),
    ("taskpool.max_samples=200",),
)  # fmt: skip
EMBEDDED = Benchmark(
    "embedded images*", "smile_embedded", images.STRENGTHS, images.STRENGTHS,
    (*MERGED, "fisher", "regmean", "adamerging"),
    (("smile_framework,smile", *ranks("16", "8,16")), ("smile_input,smile_calibrated", *ranks("16", "16"))),
)  # fmt: skip
TEXT = Benchmark(
    "embedded text*", "smile_text", text.KINDS, text.KINDS, MERGED,
    (("smile_framework,smile", *ranks("8", "8")),
     ("smile_input,smile_calibrated", *ranks("null", "16", "++method.storage=int4"))),
)  # fmt: skip
# the framework's TIES takes more than 16 GB for four of these experts
SMOLLM2 = Benchmark(
    "SmolLM2*", "smile_smollm2", smollm2.KINDS, smollm2.KINDS, MERGED[:-1],
    (("smile_framework,smile,smile_input,smile_calibrated", *ranks("8", "8")),
     ("smile_input", *ranks("null", "16", "++method.storage=int4"))),
)  # fmt: skip
BENCHMARKS = {"dinov2": DINOV2, "smollm2": SMOLLM2, "text": TEXT, "embedded": EMBEDDED}


def run(command: list[str], log_file: Path, threads: int) -> None:
    """Run a command in the folder of its log file with `threads` CPU threads.

    Raises:
        RuntimeError: if the command fails; the message holds the end of its output.
    """
    program = str(Path(sys.executable).with_name("fusion_bench"))
    with log_file.open("w") as output:
        process = subprocess.run(
            [program, *command[1:]], cwd=log_file.parent, env={"OMP_NUM_THREADS": str(threads), **os.environ},
            stdout=output, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed; the end of {log_file}:\n{log_file.read_text()[-2000:]}")


def run_all(benchmark: Benchmark, expert_sets: Sequence[str], folder: Path) -> None:
    """Run the commands concurrently; they divide the CPU cores, because small models gain little by threads.

    Raises:
        RuntimeError: see `run`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        (command, folder / f"{benchmark.experiments}-{expert_set}-{number}.log")
        for expert_set in expert_sets
        for number, command in enumerate(benchmark.commands(expert_set))
    ]
    workers = min(len(jobs), os.cpu_count() or 1)
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ThreadPoolExecutor(workers) as executor:
        list(executor.map(lambda job: run(job[0], job[1], threads), jobs))


def interval(outputs: Path) -> float:
    """Half of the widest 95 % interval of an average accuracy in a folder of outputs, in points.

    The average is that of T tasks with N independent test samples each: its variance is Σ p (1 − p) / N / T².
    """
    widths = [0.0]
    for file in outputs.rglob(REPORT_FILE):
        tasks = [(task.score, task.samples) for task in RunReport.read(file).tasks.values()]
        variance = sum(score * (100 - score) / samples for score, samples in tasks if score is not None and samples)
        widths.append(1.96 * sqrt(variance) / max(1, len(tasks)))
    return max(widths)


def parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--folder", type=Path, default=Path("demo"), help="folder of all outputs (default: demo)")
    options.add_argument("--benchmark", choices=BENCHMARKS, default="dinov2", help="(default: dinov2)")
    options.add_argument("--only", metavar="SET", help="one set of experts only")
    return options


def main() -> None:
    """Run the comparison of the command line, print the leaderboard and write it to ``FOLDER/leaderboard``."""
    started = time.perf_counter()
    options = parser()
    arguments = options.parse_args()
    benchmark = BENCHMARKS[arguments.benchmark]
    if arguments.only not in (None, *benchmark.expert_sets):
        names = ", ".join(benchmark.expert_sets)
        options.error(f"--only {arguments.only}: the benchmark {arguments.benchmark} has {names}")
    expert_sets = [arguments.only] if arguments.only else list(benchmark.default_sets)
    for command in (command for expert_set in expert_sets for command in benchmark.commands(expert_set)):
        Console(stderr=True).print(f"[dim]$ {' '.join(command)}[/dim]", soft_wrap=True, highlight=False)
    total = sum(benchmark.num_jobs(expert_set) for expert_set in expert_sets)
    try:
        with shown_progress(arguments.folder / "outputs", total, Console(stderr=True)):
            run_all(benchmark, expert_sets, arguments.folder)
    except RuntimeError as error:
        raise SystemExit(str(error)) from None
    boards, skipped = leaderboard([arguments.folder / "outputs"], benchmarks=[benchmark.name])
    show(boards, "table", Console())
    print(f"95 % intervals of the averages: at most ± {interval(arguments.folder / 'outputs'):.1f} points")
    for file in write(boards, arguments.folder / "leaderboard", skipped, f"Comparison: {arguments.benchmark}"):
        print(file)
    print(f"{time.perf_counter() - started:.0f} seconds")


if __name__ == "__main__":
    main()
