"""GLUE as text-to-text tasks, with the prompts and the preprocessing of the framework, on any number of processes."""

import logging
import statistics
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from datasets import Dataset, load_dataset
from fusion_bench.mixins import LightningFabricMixin
from fusion_bench.taskpool import BaseTaskPool
from fusion_bench.tasks.flan_t5_text_generation.glue_preprocessors import glue_processors
from fusion_bench.tasks.flan_t5_text_generation.glue_prompt_templates import glue_prompt_templates
from omegaconf import DictConfig
from scipy.stats import spearmanr
from torch import nn
from transformers import PreTrainedTokenizerBase

from ...exceptions import SmileError
from .common import evaluate_in_batches, instantiate_config, load_tokenizer, model_info

log = logging.getLogger(__name__)
REGRESSION = {"stsb"}
Example = tuple[str, str]  # prompt, expected answer


class GlueTextTaskPool(LightningFabricMixin, BaseTaskPool):
    """Evaluates a sequence-to-sequence model on GLUE tasks by the text that it generates.

    Classification is scored by exact match. STS-B is scored by Spearman's ρ over all predictions; an answer that is no
    number counts as 0, as in the framework, and constant predictions have no ρ, which is reported as null. Prompts are
    padded to the longest of their batch, generation stops after the longest expected answer, and every example is
    evaluated once.

    Args:
        tokenizer: a tokenizer, its name, or its configuration.
        test_datasets: task, e.g. ``rte`` or ``glue-rte`` → a labelled data set with the columns of GLUE, or its
            configuration.
        batch_size: of each process.

    Raises:
        SmileError: for a task that is not in GLUE.
    """

    def __init__(
        self, tokenizer: str | DictConfig | PreTrainedTokenizerBase, test_datasets: Mapping[str, Any], *,
        batch_size: int = 64, fast_dev_run: bool | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(**kwargs)
        unknown = [task for task in test_datasets if _glue_name(task) not in glue_processors]
        if unknown:
            raise SmileError(f"no GLUE task {unknown[0]!r}; the tasks are {', '.join(glue_processors)}")
        self._tokenizer, self._test_datasets = tokenizer, test_datasets
        self.batch_size, self.fast_dev_run = batch_size, bool(fast_dev_run)

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, name: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Evaluate a sequence-to-sequence model on all tasks; the report has its name.

        Returns:
            ``model_info``; for each task its metric, from 0 to 1 (``accuracy``) or −1 to 1 (``spearman_rho``), and
            ``samples``; ``average`` with the mean ``score`` of the metrics, null where one is undefined.

        Raises:
            SmileError: for a data set that is empty or has no labels, e.g. the test splits of GLUE.
        """
        tokenizer = load_tokenizer(self._tokenizer)
        model = self.fabric.to_device(model).eval()
        report: dict[str, Any] = {"model_info": model_info(model, name)}
        scores: list[Any] = []
        for task, dataset in self._test_datasets.items():
            examples = glue_examples(task, instantiate_config(dataset))
            pairs = self._answers(model, tokenizer, examples, task)
            regression = _glue_name(task) in REGRESSION
            scores.append(spearman_rho(pairs) if regression else exact_match(pairs))
            report[task] = {"spearman_rho" if regression else "accuracy": scores[-1], "samples": len(pairs)}
            log.info("%s: %s", task, report[task])
        report["average"] = {"score": None if None in scores else statistics.fmean(scores)}
        return report

    def _answers(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], task: str
    ) -> list[tuple[str, str]]:
        """The generated and the expected answer of every example."""
        tokens = {answer: tokenizer(answer).input_ids for _, answer in examples}
        expected = {answer: tokenizer.decode(ids, skip_special_tokens=True) for answer, ids in tokens.items()}
        longest = max(map(len, tokens.values()))

        def generate(indices: Sequence[int]) -> list[tuple[str, str]]:
            prompts = [examples[index][0] for index in indices]
            inputs = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").to(self.fabric.device)
            masked = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            generated = model.generate(**masked, max_new_tokens=longest, do_sample=False)
            answers = tokenizer.batch_decode(generated, skip_special_tokens=True)
            return [(answer, expected[examples[index][1]]) for index, answer in zip(indices, answers, strict=True)]

        order = sorted(range(len(examples)), key=lambda index: len(examples[index][0]))  # little padding
        return evaluate_in_batches(order, self.batch_size, generate, task=task, fast_dev_run=self.fast_dev_run)


def _glue_name(task: str) -> str:
    return task.removeprefix("glue-")


def glue_examples(task: str, dataset: Dataset) -> list[Example]:
    """The prompts and expected answers of a GLUE task, e.g. ``rte`` or ``glue-rte``, by the framework's preprocessor.

    Raises SmileError if the data set is empty or a label is missing.
    """
    name = _glue_name(task)
    if not len(dataset):
        raise SmileError(f"the data set of {name} is empty")
    if any(label == -1 for label in dataset["label"]):
        raise SmileError(f"the data set of {name} has no labels; use the validation split")
    make_processor: Any = glue_processors[name]
    preprocess = make_processor(template=glue_prompt_templates[name], tokenizer=None).preprocess
    columns = list(signature(preprocess).parameters)
    return [preprocess(**{column: row[column] for column in columns}) for row in dataset]


class GluePrompts:
    """The prompts of a GLUE task for calibration: ``input_ids`` and ``attention_mask`` of one example at a time."""

    def __init__(self, task: str, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
        self._task, self._dataset, self._tokenizer = task, dataset, tokenizer

    def __len__(self) -> int:
        """The number of examples."""
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One example. Raises SmileError if its label is missing."""
        ((prompt, _),) = glue_examples(self._task, self._dataset.select([index]))
        tokens = self._tokenizer(prompt, truncation=True)
        return {column: tokens[column] for column in ("input_ids", "attention_mask")}


def load_glue_prompts(
    task: str, tokenizer: str | DictConfig = "google/flan-t5-base", split: str = "train", path: str = "nyu-mll/glue"
) -> GluePrompts:  # fmt: skip
    """The prompts of a split of a GLUE task, e.g. ``rte``, for ``modelpool.train_datasets``."""
    return GluePrompts(task, load_dataset(path, _glue_name(task), split=split), load_tokenizer(tokenizer))


def tokenize_glue_prompts(task: str, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The prompts of a GLUE task for calibration: a data set with the columns ``input_ids`` and ``attention_mask``.

    Raises SmileError if the data set is empty or a label is missing.
    """
    tokens = tokenizer([prompt for prompt, _ in glue_examples(task, dataset)], truncation=True)
    return Dataset.from_dict({column: tokens[column] for column in ("input_ids", "attention_mask")})


def exact_match(pairs: Sequence[tuple[str, str]]) -> float:
    """The share of pairs of a generated and an expected answer that are equal, from 0 to 1."""
    return sum(answer == expected for answer, expected in pairs) / len(pairs)


def spearman_rho(pairs: Sequence[tuple[str, str]]) -> float | None:
    """Spearman's rank correlation of generated and expected answers as numbers; None where it is undefined."""
    answers, expected = ([_number(text) for text in column] for column in zip(*pairs, strict=True))
    if len(set(answers)) < 2 or len(set(expected)) < 2:
        return None
    return float(spearmanr(answers, expected).statistic)


def _number(text: str) -> float:
    """The number in a text; 0 for a text without one."""
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if value == value else 0.0  # float() reads "nan" too
