"""The language benchmark as local tasks of lm-eval: ``python -m smile_zoo.smollm2.lm_eval FOLDER``.

It writes one YAML file per task, named ``smollm2_sections`` and so on, which read the installed data. The framework's
task pool for lm-eval takes the folder as ``taskpool.include_path``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from fusion_bench_smile.io import write_atomically
from smile_zoo.smollm2 import DATA, METRICS, TASKS

PREFIX = "smollm2_"
TEMPLATE = """\
task: {name}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], do_sample: false, max_gen_toks: 64}}
filter_list: [{{name: none, filter: [{{function: remove_whitespace}}, {{function: take_first}}]}}]
metric_list: [{{metric: {metric}}}]
"""


def write_tasks(folder: Path, tasks: Iterable[str] = TASKS) -> list[Path]:
    """Write the test splits of some tasks as tasks of lm-eval, one YAML file each.

    Args:
        folder: of the files; it is created.
        tasks: of the benchmark.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for task in tasks:
        data = (DATA / "texts" / f"{task}-test.parquet").as_posix()
        files.append(folder / f"{PREFIX}{task}.yaml")
        write_atomically(files[-1], TEMPLATE.format(name=PREFIX + task, file=data, metric=METRICS[task]))
    return files


def main() -> None:
    """Write all tasks to the folder of the command line and print the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for the YAML files")
    for file in write_tasks(parser.parse_args().folder):
        print(file)


if __name__ == "__main__":
    main()
