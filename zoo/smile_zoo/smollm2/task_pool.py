"""Text generation of causal language models, scored by exact match or chrF, on any number of processes."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from datasets import Dataset
from fusion_bench.mixins import LightningFabricMixin
from fusion_bench.taskpool import BaseTaskPool
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from fusion_bench_smile.exceptions import SmileError
from fusion_bench_smile.framework.task_pools import evaluate_in_batches, instantiate_config, load_tokenizer, model_info
from smile_zoo.loading import check_columns

log = logging.getLogger(__name__)

Metric = Literal["exact_match", "chrf"]
METRICS: tuple[Metric, ...] = get_args(Metric)
Answers = list[tuple[str, str]]  # generated, expected


class GenerationTaskPool(LightningFabricMixin, BaseTaskPool):
    """Evaluates a causal language model by the line that it generates after each prompt.

    Decoding is greedy. An answer ends with the line, with the model's end token, or when it has one token more than the
    longest expected answer of its task.

    Args:
        tokenizer: a tokenizer, its name, or its configuration.
        tasks: task → ``dataset``, a data set with the columns ``prompt`` and ``answer``, or its configuration, and
            ``metric``: ``exact_match`` (the default), the share of answers that equal the expected one; or ``chrf``,
            the chrF of the corpus (character 6-grams, β = 2), which needs ``sacrebleu``.
        batch_size: of each process.
        fast_dev_run: evaluate one batch of each task.
    """

    def __init__(
        self,
        tokenizer: str | DictConfig | PreTrainedTokenizerBase,
        tasks: Mapping[str, Mapping[str, Any]],
        *,
        batch_size: int = 50,
        fast_dev_run: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._tokenizer, self._tasks = tokenizer, tasks
        self.batch_size, self.fast_dev_run = batch_size, bool(fast_dev_run)

    @torch.inference_mode()
    def evaluate(self, model: Any, name: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Evaluate a causal language model on all tasks.

        Args:
            model: with transformers' ``generate``.
            name: of the model, for the report.

        Returns:
            ``model_info``; for each task ``samples`` and ``exact_match``, from 0 to 1, or ``chrf``, from 0 to 100 as in
            sacreBLEU and lm-eval; ``average`` with the mean ``score``, from 0 to 1.

        Raises:
            SmileError: for a data set that is empty or lacks a column, an unknown metric, or chrF without sacrebleu.
        """
        tokenizer = load_tokenizer(self._tokenizer)
        model = self.fabric.to_device(model).eval()
        report: dict[str, Any] = {"model_info": model_info(model, name)}
        scores = []
        for task, entry in self._tasks.items():
            metric = entry.get("metric", "exact_match")
            examples = prompt_examples(task, instantiate_config(entry["dataset"]))
            answers = self._answers(model, tokenizer, examples, task)
            scores.append(score(metric, answers, task))
            report[task] = {metric: scores[-1] * (100 if metric == "chrf" else 1), "samples": len(answers)}
            log.info("%s: %s", task, report[task])
        report["average"] = {"score": statistics.fmean(scores)}
        return report

    def _answers(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, examples: Sequence[tuple[str, str]], task: str
    ) -> Answers:
        """The generated and the expected answer of every example."""
        ends = end_tokens(tokenizer)
        longest = 1 + max(len(tokenizer(f" {answer}").input_ids) for _, answer in examples)

        def generate(indices: Sequence[int]) -> Answers:
            prompts = [examples[index][0] for index in indices]
            inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt").to(self.fabric.device)
            masked = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            generated = model.generate(
                **masked,
                max_new_tokens=longest,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=tokenizer.pad_token_id,
            )
            texts = tokenizer.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            return [(first_line(text), examples[index][1]) for index, text in zip(indices, texts, strict=True)]

        order = sorted(range(len(examples)), key=lambda index: len(examples[index][0]))  # little padding
        return evaluate_in_batches(order, self.batch_size, generate, task=task, fast_dev_run=self.fast_dev_run)


def prompt_examples(task: str, dataset: Dataset) -> list[tuple[str, str]]:
    """The prompts and answers of a data set.

    Args:
        task: the name in messages.
        dataset: with the columns ``prompt`` and ``answer``.

    Raises:
        SmileError: if the data set is empty or a column is missing.
    """
    check_columns(task, dataset, "prompt", "answer")
    return list(zip(dataset["prompt"], dataset["answer"], strict=True))


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of all tokens that end an answer: the tokenizer's end token, and each token with a line break."""
    tokens = tokenizer.get_vocab()
    breaks = {index for token, index in tokens.items() if "\n" in tokenizer.convert_tokens_to_string([token])}
    return sorted(breaks | ({tokenizer.eos_token_id} - {None}))


def first_line(text: str) -> str:
    """The first line of a text, without spaces around it."""
    return text.partition("\n")[0].strip()


def score(metric: str, answers: Answers, task: str) -> float:
    """The score of generated and expected answers, from 0 to 1.

    Args:
        metric: ``"exact_match"`` or ``"chrf"``.
        answers: pairs of a generated and an expected answer.
        task: the name in messages.

    Raises:
        SmileError: for an unknown metric, or chrF without sacrebleu.
    """
    if metric == "exact_match":
        return sum(generated == expected for generated, expected in answers) / len(answers)
    if metric != "chrf":
        raise SmileError(f"{task} has no metric {metric!r}; the metrics are {', '.join(METRICS)}")
    try:
        from sacrebleu import corpus_chrf
    except ImportError:
        raise SmileError(f"{task} is scored by chrF, which needs sacrebleu: pip install sacrebleu") from None
    generated, expected = (list(column) for column in zip(*answers, strict=True))
    return corpus_chrf(generated, [expected]).score / 100
