"""GLUE in text-to-text form, with the framework's prompts and preprocessing, right on any number of processes."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from datasets import Dataset
from fusion_bench.mixins import LightningFabricMixin
from fusion_bench.taskpool import BaseTaskPool
from fusion_bench.tasks.flan_t5_text_generation.glue_preprocessors import glue_processors
from fusion_bench.tasks.flan_t5_text_generation.glue_prompt_templates import glue_prompt_templates
from omegaconf import DictConfig
from scipy.stats import spearmanr
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .ending import one_clear_line
from .errors import SmileError
from .evaluation import instantiated, load_tokenizer, model_info
from .sharing import Share

log = logging.getLogger(__name__)

REGRESSION = {"stsb"}
Example = tuple[str, str]  # prompt, expected answer


class GlueTextTaskPool(LightningFabricMixin, BaseTaskPool):
    """Evaluates a sequence-to-sequence model on GLUE tasks by the text it generates.

    Exact match for classification, Spearman's ρ of all predictions together for STS-B (an answer that is no number
    counts as 0, as in the framework; constant predictions have no ρ: it is reported as null). Prompts are padded to the
    longest of their batch, generation stops after the longest expected answer, and every example counts once.

    Args:
        tokenizer: a tokenizer, its name, or the configuration of one.
        test_datasets: task, e.g. ``rte`` or ``glue-rte`` → a labelled data set with GLUE's columns, or the
            configuration of one.
        batch_size: of each process.
        fast_dev_run: evaluate one batch of each task.
    """

    def __init__(
        self,
        tokenizer: str | DictConfig | PreTrainedTokenizerBase,
        test_datasets: Mapping[str, Any],
        *,
        batch_size: int = 64,
        fast_dev_run: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        unknown = [task for task in test_datasets if _glue_name(task) not in glue_processors]
        with one_clear_line():
            if unknown:
                raise SmileError(f"no GLUE task {unknown[0]!r}; the tasks are {', '.join(glue_processors)}")
        self._tokenizer, self._test_datasets = tokenizer, test_datasets
        self.batch_size, self.fast_dev_run = batch_size, bool(fast_dev_run)

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, name: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """The metric and number of examples of every task, and the average of the metrics.

        Raises:
            SmileError: for examples without labels, e.g. GLUE's own test splits.
        """
        tokenizer = load_tokenizer(self._tokenizer)
        model = self.fabric.to_device(model).eval()
        report: dict[str, Any] = {"model_info": model_info(model, name)}
        scores = []
        for task, source in self._test_datasets.items():
            dataset = instantiated(source)
            with one_clear_line():
                data = examples(_glue_name(task), dataset)
            pairs = self._answers(model, tokenizer, data, task)
            metric = "spearman_rho" if _glue_name(task) in REGRESSION else "accuracy"
            scores.append(spearman_rho(pairs) if metric == "spearman_rho" else accuracy(pairs))
            report[task] = {metric: scores[-1], "samples": len(pairs)}
            log.info("%s: %s", task, report[task])
        defined = [score for score in scores if score is not None]
        report["average"] = {"score": statistics.fmean(defined) if len(defined) == len(scores) else None}
        return report

    def _answers(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, data: Sequence[Example], task: str
    ) -> list[tuple[str, str]]:
        """What was generated and what was expected, of all processes' examples, in their order."""
        share = Share(alone=False)
        expected = {target: tokenizer(target).input_ids for _, target in data}
        longest = max(len(tokens) for tokens in expected.values())
        mine = sorted(range(share.rank, len(data), share.size), key=lambda number: len(data[number][0]))
        batches = [mine[start : start + self.batch_size] for start in range(0, len(mine), self.batch_size)]
        answers: dict[int, str] = {}
        for batch in tqdm(batches[:1] if self.fast_dev_run else batches, desc=f"Evaluating {task}", leave=False):
            prompts = tokenizer(
                [data[number][0] for number in batch], padding=True, truncation=True, return_tensors="pt"
            ).to(self.fabric.device)
            generated = model.generate(
                input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, max_new_tokens=longest,
                do_sample=False,
            )  # fmt: skip
            answers |= dict(zip(batch, tokenizer.batch_decode(generated, skip_special_tokens=True), strict=True))
        together = {number: answer for part in share.exchange(answers) for number, answer in part.items()}
        texts = {target: tokenizer.decode(tokens, skip_special_tokens=True) for target, tokens in expected.items()}
        return [(together[number], texts[data[number][1]]) for number in sorted(together)]


def _glue_name(task: str) -> str:
    return task.removeprefix("glue-")


def examples(task: str, dataset: Dataset) -> list[Example]:
    """The prompts and expected answers of a task, as the framework's preprocessor makes them.

    Raises:
        SmileError: if there are none, or one has no label.
    """
    if not len(dataset):
        raise SmileError(f"the data set of {task} is empty")
    if any(label == -1 for label in dataset["label"]):
        raise SmileError(f"the data set of {task} has no labels; use the validation split")
    make: Any = glue_processors[task]
    preprocessor = make(template=glue_prompt_templates[task], tokenizer=None)
    columns = list(signature(preprocessor.preprocess).parameters)
    return [preprocessor.preprocess(**{column: row[column] for column in columns}) for row in dataset]


def tokenized(task: str, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The prompts of a task as the model takes them, for calibration: columns ``input_ids``, ``attention_mask``.

    Raises:
        SmileError: see `examples`.
    """
    prompts = [prompt for prompt, _ in examples(_glue_name(task), dataset)]
    tokens = tokenizer(prompts, truncation=True)
    return Dataset.from_dict({name: tokens[name] for name in ("input_ids", "attention_mask")})


def accuracy(pairs: Sequence[tuple[str, str]]) -> float:
    """The share of answers that are exactly what was expected."""
    return sum(answer == target for answer, target in pairs) / len(pairs)


def spearman_rho(pairs: Sequence[tuple[str, str]]) -> float | None:
    """The rank correlation of the answers, as numbers, with the expected ones; None where it is not defined."""
    answers, targets = ([_number(text) for text in column] for column in zip(*pairs, strict=True))
    if len(set(answers)) < 2 or len(set(targets)) < 2:
        return None
    return float(spearmanr(answers, targets).statistic)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if value == value else 0.0  # "nan" is no answer either
