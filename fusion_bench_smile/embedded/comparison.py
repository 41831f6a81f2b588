"""The main job of the embedded benchmark: run every method through the framework, then one table and one picture.

python -m fusion_bench_smile.embedded.comparison                   # runs everything, prints and draws it
python -m fusion_bench_smile.embedded.comparison --benchmark text  # the text benchmark instead of the images
python -m fusion_bench_smile.embedded.comparison --no-run          # only gathers the reports that lie there
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from rich.console import Console
from rich.table import Table

from . import STRENGTHS, TASKS, text

NUMBERS = ("average", "retention", "parameters", "seconds")
MERGED = ("pretrained", "simple_average", "task_arithmetic", "ties_merging")


@dataclass(frozen=True)
class Benchmark:
    """An embedded benchmark, as the comparison runs it.

    Attributes:
        experiments: the configurations' group, ``experiment/<experiments>/<row>``.
        option: what picks one of the `sets` of experts.
        pools: the choices of Hydra that go with a set of experts.
    """

    name: str
    experiments: str
    option: str
    sets: tuple[str, ...]
    tasks: tuple[str, ...]
    rows: tuple[str, ...]
    pools: tuple[str, ...]

    def commands(self, chosen: str) -> list[list[str]]:
        """The framework's own commands that make one comparison: each runs its jobs one after the other."""
        common = ["fusion_bench", "-m", f"++{self.option}={chosen}"]
        experiments = ",".join(f"{self.experiments}/{row}" for row in self.rows)
        pools = [pool.format(chosen) for pool in self.pools]
        individual = [f"+experiment={self.experiments}/individual", f"+task={','.join(self.tasks)}"]
        return [[*common, *pools, f"+experiment={experiments}"], [*common, *individual]]


IMAGES = Benchmark(
    "images", "smile_embedded", "strength", STRENGTHS, TASKS,
    (*MERGED, "adamerging", "smile_framework", "smile_small", "smile"), ("modelpool=SmileEmbedded/{}",),
)  # fmt: skip
TEXT = Benchmark(
    "text", "smile_text", "kind", text.KINDS, text.TASKS,
    (*MERGED, "smile_framework", "smile", "smile_large"), ("modelpool=SmileText/{}", "taskpool=SmileText/{}"),
)  # fmt: skip
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
        log_file = folder / f"{chosen}-{number}.log"
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


def gather(folder: Path, chosen: str, benchmark: Benchmark = IMAGES) -> pd.DataFrame:
    """One row for each method: accuracy in percent for each task, and the columns of `NUMBERS`.

    `retention` is the average in percent of the individual models' average, `parameters` the ratio to the pretrained
    model's, `seconds` the time the method took.

    Raises:
        FileNotFoundError: naming the report that is missing.
    """

    def read(row: str) -> dict:
        file = folder / "outputs" / benchmark.experiments / chosen / row / "program_report.json"
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing: run the comparison without --no-run first")
        return json.loads(file.read_text())

    own = {task: read(f"individual_{task}") for task in benchmark.tasks}
    individual = {task: 100 * own[task][task]["accuracy"] for task in benchmark.tasks}
    pretrained = read("pretrained")["model_info"]["all_params"]
    # what a user of the individual models has to keep
    total = sum(report["model_info"]["all_params"] for report in own.values())
    rows = [{"method": "individual", **individual, "parameters": total / pretrained, "seconds": float("nan")}]
    for row in benchmark.rows:
        report = read(row)
        rows.append(
            {
                "method": report["run"]["label"],
                **{task: 100 * report[task]["accuracy"] for task in benchmark.tasks},
                "parameters": report["model_info"]["all_params"] / pretrained,
                "seconds": report["run"]["method_seconds"],
            }
        )
    table = pd.DataFrame(rows).set_index("method")
    table.insert(len(benchmark.tasks), "average", table[list(benchmark.tasks)].mean(axis=1))
    table.insert(len(benchmark.tasks) + 1, "retention", 100 * table["average"] / table.loc["individual", "average"])
    return table


def formatted(table: pd.DataFrame) -> pd.DataFrame:
    """The table as text: accuracies and retention with one decimal, ratios and seconds with two."""
    digits = {column: 2 if column in ("parameters", "seconds") else 1 for column in table.columns}
    text = pd.DataFrame({c: [("" if pd.isna(v) else f"{v:.{digits[c]}f}") for v in table[c]] for c in table.columns})
    text["parameters"] += "×"
    return text.set_index(table.index)


def show(table: pd.DataFrame, title: str) -> None:
    shown = Table(title=title, caption="accuracy in %, retention in % of the individual models")
    shown.add_column("method", no_wrap=True)
    for column in table.columns:
        shown.add_column(column, justify="right")
    for method, row in formatted(table).iterrows():
        shown.add_row(str(method), *row)
    Console(width=max(150, Console().width)).print(shown)


def to_markdown(table: pd.DataFrame) -> str:
    text = formatted(table)
    lines = [" | ".join(["method", *text.columns]), " | ".join(["---", *["---:"] * len(text.columns)])]
    lines += [" | ".join([str(method), *row]) for method, row in text.iterrows()]
    return "".join(f"| {line} |\n" for line in lines)


def draw(tables: dict[str, pd.DataFrame], file: Path) -> None:
    """Retention against parameter ratio, one panel for each set of experts."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(tables), figsize=(2 + 5 * len(tables), 4.6), squeeze=False, layout="constrained")
    markers = "Ps^vD*oXh"
    colors = ("#000000", "#7f7f7f", "#56b4e9", "#009e73", "#e69f00", "#cc79a7", "#999933", "#d55e00", "#0072b2")
    for axis, (chosen, table) in zip(axes[0], tables.items(), strict=True):
        for (method, row), marker, color in zip(table.iterrows(), markers, colors, strict=False):
            axis.scatter(row["parameters"], row["retention"], s=75, marker=marker, color=color, label=method, zorder=3)
        axis.axhline(100, color="0.8", linewidth=1, zorder=1)
        axis.set_xscale("log", base=2)
        axis.set_xticks([1, 1.5, 2, 4, 8], ["1×", "1.5×", "2×", "4×", "8×"])
        axis.minorticks_off()
        axis.set_xlabel("parameters, relative to the pretrained model")
        axis.set_ylabel("retention (%)")
        axis.set_title(f"{chosen} fine-tuning")
        axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def write(tables: dict[str, pd.DataFrame], folder: Path) -> list[Path]:
    """Write each table as Markdown and CSV and the picture; each is complete or not there."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for chosen, table in tables.items():
            (Path(scratch) / f"comparison-{chosen}.md").write_text(to_markdown(table))
            table.round(4).to_csv(Path(scratch) / f"comparison-{chosen}.csv")
        draw(tables, Path(scratch) / "comparison.png")
        for file in sorted(Path(scratch).iterdir()):
            os.replace(file, folder / file.name)
            written.append(folder / file.name)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where everything goes (default: demo)")
    parser.add_argument("--no-run", action="store_true", help="gather the reports of an earlier run")
    parser.add_argument("--benchmark", choices=BENCHMARKS, default="images", help="(default: images)")
    parser.add_argument("--only", metavar="SET", help="one set of experts only: gentle, strong; full, lora")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    started = time.perf_counter()
    benchmark = BENCHMARKS[arguments.benchmark]
    if arguments.only not in (None, *benchmark.sets):
        parser.error(f"--only {arguments.only}: the {benchmark.name} benchmark has {', '.join(benchmark.sets)}")
    sets = [arguments.only] if arguments.only else benchmark.sets
    try:
        if not arguments.no_run:
            run_all(benchmark, sets, arguments.folder)
        tables = {chosen: gather(arguments.folder, chosen, benchmark) for chosen in sets}
    except (RuntimeError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from None
    for chosen, table in tables.items():
        show(table, f"embedded benchmark ({benchmark.name}), {chosen} fine-tuning")
    for file in write(tables, arguments.folder):
        print(file)
    print(f"{time.perf_counter() - started:.0f} seconds")


if __name__ == "__main__":
    main()
