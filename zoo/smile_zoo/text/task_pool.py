"""Text classification with one encoder and a head for each task, on any number of processes."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from fusion_bench.mixins import LightningFabricMixin
from fusion_bench.taskpool import BaseTaskPool
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BatchEncoding, PreTrainedTokenizerBase

from fusion_bench_smile.exceptions import SmileError
from fusion_bench_smile.framework.task_pools import evaluate_in_batches, instantiate_config, load_tokenizer, model_info
from smile_zoo.heads import Head, load_head
from smile_zoo.loading import check_columns

log = logging.getLogger(__name__)

Text = str | tuple[str, str]  # a text, or a pair of texts


def tokenize_batch(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], max_length: int = 64) -> BatchEncoding:
    """Texts, or pairs of texts, as one batch of tensors (N, tokens), padded to the longest.

    Args:
        tokenizer: of the encoder.
        texts: N texts, or N pairs.
        max_length: tokens of the longest text; longer ones are truncated.
    """
    firsts = [text if isinstance(text, str) else text[0] for text in texts]
    seconds = [text[1] for text in texts if not isinstance(text, str)]
    return tokenizer(firsts, seconds or None, padding=True, truncation=True, max_length=max_length, return_tensors="pt")


def mean_pooled_embeddings(encoder: nn.Module, batch: BatchEncoding) -> Tensor:
    """The mean of the last hidden states over all tokens but padding: (N, D), in the encoder's dtype.

    Args:
        encoder: a model with ``last_hidden_state`` in its output.
        batch: its keyword arguments, with an ``attention_mask`` (N, tokens).
    """
    hidden = encoder(**batch).last_hidden_state  # (N, tokens, D)
    mask = batch["attention_mask"][..., None].to(hidden.dtype)  # (N, tokens, 1)
    return (hidden * mask).sum(1) / mask.sum(1)


class TextClassificationTaskPool(LightningFabricMixin, BaseTaskPool):
    """Evaluates an encoder on text classification tasks. Each task has its head, which is not part of the model.

    Args:
        tokenizer: a tokenizer, its name, or its configuration.
        tasks: task → ``dataset``, a data set with the columns ``text``, ``pair`` (for pairs of texts) and ``label``
            (class index), or its configuration, and ``head``, a `Head`, its file, or its configuration.
        batch_size: of each process.
        fast_dev_run: evaluate one batch of each task.
    """

    def __init__(
        self,
        tokenizer: str | DictConfig | PreTrainedTokenizerBase,
        tasks: Mapping[str, Mapping[str, Any]],
        *,
        batch_size: int = 100,
        fast_dev_run: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._tokenizer, self._tasks = tokenizer, tasks
        self.batch_size, self.fast_dev_run = batch_size, bool(fast_dev_run)

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, name: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Evaluate an encoder on all tasks.

        Args:
            model: the encoder.
            name: of the model, for the report.

        Returns:
            ``model_info``; for each task ``accuracy``, from 0 to 1, and ``samples``; ``average`` with the mean
            ``accuracy``.

        Raises:
            SmileError: for a data set that is empty or lacks a column, or a head that doesn't fit.
        """
        tokenizer = load_tokenizer(self._tokenizer)
        model = self.fabric.to_device(model).eval()
        report: dict[str, Any] = {"model_info": model_info(model, name)}
        for task, entry in self._tasks.items():
            dataset, head = instantiate_config(entry["dataset"]), load_head(entry["head"])
            texts, labels = text_examples(task, dataset)
            predictions = self._predictions(model, tokenizer, head, texts, labels, task)
            correct = [prediction == label for prediction, label in predictions]
            report[task] = {"accuracy": sum(correct) / len(correct), "samples": len(correct)}
            log.info("%s: %s", task, report[task])
        report["average"] = {"accuracy": statistics.fmean(report[task]["accuracy"] for task in self._tasks)}
        return report

    def _predictions(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        head: Head,
        texts: Sequence[Text],
        labels: Sequence[int],
        task: str,
    ) -> list[tuple[int, int]]:
        """The predicted and the labelled class of every text."""
        if max(labels) >= len(head.bias):
            raise SmileError(f"{task}: the head has {len(head.bias)} classes, a label is {max(labels)}")
        device = self.fabric.device
        weight, bias = head.weight.to(device), head.bias.to(device)

        def classify(indices: Sequence[int]) -> list[tuple[int, int]]:
            batch = tokenize_batch(tokenizer, [texts[index] for index in indices]).to(device)
            embeddings = mean_pooled_embeddings(model, batch).float()
            if embeddings.shape[-1] != weight.shape[-1]:
                raise SmileError(f"{task}: the head takes {weight.shape[-1]} values, got {embeddings.shape[-1]}")
            classes = F.linear(embeddings, weight, bias).argmax(dim=-1).tolist()
            return [(predicted, labels[index]) for predicted, index in zip(classes, indices, strict=True)]

        order = range(len(texts))
        return evaluate_in_batches(order, self.batch_size, classify, task=task, fast_dev_run=self.fast_dev_run)


def text_examples(task: str, dataset: Dataset) -> tuple[list[Text], list[int]]:
    """The texts, or pairs of texts, and the class indices of a data set.

    Args:
        task: the name in messages.
        dataset: with the columns ``text``, ``pair`` (for pairs of texts) and ``label``.

    Raises:
        SmileError: if the data set is empty or a column is missing.
    """
    check_columns(task, dataset, "text", "label")
    texts = list(dataset["text"])
    pairs = list(zip(texts, dataset["pair"], strict=True)) if "pair" in dataset.column_names else texts
    return pairs, list(dataset["label"])
