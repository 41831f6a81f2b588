"""A tiny T5 and eight tasks in text-to-text form, with GLUE's names, columns and prompts, and their experts.

For the framework's Flan-T5 path without a network. The sentences are real, the labels follow from how they were put
together; `docs/embedded_text.md` says how, and ``python -m fusion_bench_smile.embedded.glue.build`` makes it anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..shipped import check_names, read_table, with_adapter

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, T5ForConditionalGeneration

DATA = Path(__file__).parent / "data"
TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
SPLITS = ("train", "validation")

Split = Literal["train", "validation"]


def load_pretrained() -> T5ForConditionalGeneration:
    """The pretrained T5, in float32."""
    import torch
    from transformers import T5ForConditionalGeneration

    return T5ForConditionalGeneration.from_pretrained(DATA / "t5", torch_dtype=torch.float32)


def load_tokenizer() -> PreTrainedTokenizerBase:
    """The T5's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DATA / "t5")


def load_sentences(task: str, split: Split = "validation") -> Dataset:
    """The examples of a task, with GLUE's columns.

    Raises:
        SmileError: for an unknown task or split.
    """
    check_names(task=(task, TASKS), split=(split, SPLITS))
    return read_table(DATA / "sentences" / f"{task}-{split}.parquet")


def load_inputs(task: str, split: Split = "train") -> Dataset:
    """The prompts of a task as the T5 takes them: columns ``input_ids``, ``attention_mask``.

    Raises:
        SmileError: for an unknown task or split.
    """
    from ...glue import tokenized

    return tokenized(task, load_sentences(task, split), load_tokenizer())


def expert_folder(task: str) -> Path:
    """The folder with the adapter of one expert.

    Raises:
        SmileError: for an unknown task.
    """
    check_names(task=(task, TASKS))
    return DATA / "experts" / task


def load_expert(task: str) -> T5ForConditionalGeneration:
    """The T5 fine-tuned on one task: the pretrained one with that task's adapter merged into it.

    Raises:
        SmileError: for an unknown task.
    """
    return with_adapter(load_pretrained(), expert_folder(task))
