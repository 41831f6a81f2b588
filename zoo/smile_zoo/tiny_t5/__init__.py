"""A tiny T5 and its experts for eight text-to-text tasks with the names, columns and prompts of GLUE.

They exercise the framework's Flan-T5 path without a network. The sentences are real, the labels follow from the way
they were composed. `docs/embedded_text.md` describes both; ``python -m recipes.tiny_t5`` builds them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from fusion_bench_smile.io import lazy_source
from smile_zoo.loading import check_names, read_table, with_adapter

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, T5ForConditionalGeneration

DATA = Path(__file__).parent / "data"
TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = get_args(Split)


def load_pretrained() -> T5ForConditionalGeneration:
    """Load the pretrained T5, in float32."""
    import torch
    from transformers import T5ForConditionalGeneration

    return T5ForConditionalGeneration.from_pretrained(DATA / "t5", torch_dtype=torch.float32)


def load_tokenizer() -> PreTrainedTokenizerBase:
    """Load the T5's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DATA / "t5")


def load_sentences(task: str, split: Split = "validation") -> Dataset:
    """Load the examples of a task, with GLUE's columns.

    Raises:
        SmileError: for an unknown task or split.
    """
    check_names(task=(task, TASKS), split=(split, SPLITS))
    return read_table(DATA / "sentences" / f"{task}-{split}.parquet")


def load_inputs(task: str, split: Split = "train") -> Dataset:
    """Load the tokenized prompts of a task, for calibration.

    Returns:
        A data set with the columns ``input_ids`` and ``attention_mask``, without padding.

    Raises:
        SmileError: for an unknown task or split.
    """
    from fusion_bench_smile.framework.task_pools import tokenize_glue_prompts

    return tokenize_glue_prompts(task, load_sentences(task, split), load_tokenizer())


def expert_folder(task: str) -> Path:
    """Folder of an expert's adapter, in PEFT's format.

    Raises:
        SmileError: for an unknown task.
    """
    check_names(task=(task, TASKS))
    return DATA / "experts" / task


@lazy_source(expert_folder)
def load_expert(task: str) -> T5ForConditionalGeneration:
    """Load the T5 fine-tuned on one task, in float32: the pretrained T5 with the merged adapter.

    Raises:
        SmileError: for an unknown task.
    """
    return with_adapter(load_pretrained(), expert_folder(task))
