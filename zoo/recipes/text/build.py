"""The steps of the recipe: download, cut texts, probe, fine-tune, export."""

from __future__ import annotations

import logging
import time
from functools import cache
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, Value
from peft import PeftModel
from transformers import BertModel, PreTrainedModel

from recipes.common.adapters import extract_adapter, save_adapter
from recipes.common.packages import cached, fetch
from recipes.text.finetune import finetune, linear_layers, probe
from recipes.text.tasks import DEBIAN, SIZES, Texts, build_task
from smile_zoo.heads import Head
from smile_zoo.text import (
    DATA,
    HEAD,
    KINDS,
    TASKS,
    Kind,
    expert_folder,
    load_head,
    load_pretrained,
    load_texts,
    load_tokenizer,
)
from smile_zoo.text.evaluate import accuracy, arrays

log = logging.getLogger(__name__)

RANK = 16  # of the adapters that are extracted from full fine-tunes


def export_texts(task: str, texts: Texts) -> None:
    """Write each split as parquet, in the format of the datasets library."""
    (DATA / "texts").mkdir(parents=True, exist_ok=True)
    classes = sorted(set(texts["train"]["label"]))
    for split in SIZES:
        table = texts[split].assign(label=texts[split]["label"].map(classes.index))
        features = Features({c: ClassLabel(names=classes) if c == "label" else Value("string") for c in table.columns})
        file = DATA / "texts" / f"{task}-{split}.parquet"
        dataset = Dataset.from_pandas(table, features, preserve_index=False)
        pq.write_table(dataset.data.table, file, compression="zstd")


@cache
def initial_head(task: str) -> Head:
    """Fit the head with which every fine-tuning of a task starts."""
    return probe(load_pretrained().eval(), load_tokenizer(), *arrays(load_texts(task, "train"), task))


def fine_tuned(
    encoder: BertModel, task: str, kind: Kind, folder: Path, seed: int = 0
) -> tuple[PreTrainedModel | PeftModel, Head]:
    """Fine-tune an encoder and a head on one task and save them to `folder`, or load them from there."""
    if not folder.exists():
        texts, labels = arrays(load_texts(task, "train"), task)
        tuned, head = finetune(encoder, load_tokenizer(), initial_head(task), texts, labels, kind, seed)
        scratch = folder.with_suffix(".part")
        folder.parent.mkdir(parents=True, exist_ok=True)
        tuned.save_pretrained(str(scratch))
        head.save(scratch / HEAD)
        scratch.rename(folder)
    head = Head.load(folder / HEAD)
    if kind == "lora":
        return PeftModel.from_pretrained(load_pretrained(), str(folder)), head
    return BertModel.from_pretrained(folder), head


def build(root: Path) -> pd.DataFrame:
    """Build the benchmark below `root` and export it to the data folder of `smile_zoo.text`.

    Returns:
        Accuracy in percent of each expert on its task: of the pretrained model, fine-tuned, of the exported adapter.
    """
    packages, encoder = fetch(root, DEBIAN), load_pretrained().eval()
    rows = []
    for task in TASKS:
        export_texts(task, cached(root / f"{task}.pkl", lambda: build_task(task, packages)))  # noqa: B023  called at once
        rows += [_build_expert(root, encoder, task, kind) for kind in KINDS]
    return pd.DataFrame(rows)


def _build_expert(root: Path, encoder: BertModel, task: str, kind: Kind) -> dict[str, object]:
    started = time.perf_counter()
    tokenizer, test = load_tokenizer(), arrays(load_texts(task), task)
    tuned, head = fine_tuned(encoder, task, kind, root / f"{kind}-{task}")
    if isinstance(tuned, PeftModel):
        adapter = tuned
    else:
        adapter = extract_adapter(encoder, tuned, RANK, linear_layers(encoder), ["LayerNorm"])
    accuracies = {
        "pretrained": accuracy(encoder, tokenizer, head, *test),
        "fine-tuned": accuracy(tuned.eval(), tokenizer, head, *test),
    }
    save_adapter(adapter, expert_folder(task, kind))
    head.save(expert_folder(task, kind) / HEAD)
    exported = PeftModel.from_pretrained(load_pretrained(), str(expert_folder(task, kind))).eval()
    accuracies["adapter"] = accuracy(exported, tokenizer, load_head(task, kind), *test)
    row = {"task": task, "kind": kind, **accuracies, "seconds": time.perf_counter() - started}
    log.info("%s", row)
    return row
