"""Text classification with one encoder and one head for each task, right on any number of processes."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fusion_bench.mixins import LightningFabricMixin
from fusion_bench.taskpool import BaseTaskPool
from omegaconf import DictConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import BatchEncoding, PreTrainedTokenizerBase

from .ending import one_clear_line
from .errors import SmileError
from .evaluation import instantiated, load_tokenizer, model_info
from .sharing import Share

log = logging.getLogger(__name__)

Text = str | tuple[str, str]


class Head(NamedTuple):
    """A linear classifier of C classes on embeddings of size D: weight (C, D) and bias (C,), float32."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def load(cls, file: str | Path) -> Head:
        """From a safetensors file with the tensors ``weight`` and ``bias``.

        Raises:
            SmileError: naming the file, if it is missing or holds something else.
        """
        try:
            tensors = load_file(file)
            return cls(tensors["weight"].float(), tensors["bias"].float())
        except (OSError, SafetensorError, KeyError) as error:
            raise SmileError(f"{file} is no classification head with weight and bias: {error}") from None

    def save(self, file: str | Path) -> None:
        save_file({"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}, file)


def batch_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], max_length: int = 64) -> BatchEncoding:
    """Texts, or pairs of them, padded to the longest."""
    firsts = [text if isinstance(text, str) else text[0] for text in texts]
    seconds = [text[1] for text in texts if not isinstance(text, str)]
    return tokenizer(firsts, seconds or None, padding=True, truncation=True, max_length=max_length, return_tensors="pt")


def embed(encoder: nn.Module, batch: BatchEncoding) -> Tensor:
    """The mean of the encoder's last hidden states over the tokens that are no padding: (N, D)."""
    hidden = encoder(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


class TextClassificationTaskPool(LightningFabricMixin, BaseTaskPool):
    """Evaluates an encoder on text classification tasks. Each task has a head of its own, which no method merges.

    Args:
        tokenizer: a tokenizer, its name, or the configuration of one.
        tasks: task → ``dataset``, a data set with the columns ``text``, ``pair`` (for sentence pairs) and ``label``
            (class number), or the configuration of one, and ``head``, a `Head`, the file of one, or its configuration.
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
        """Accuracy and number of examples of every task, and the average accuracy.

        Raises:
            SmileError: for a data set that is empty or lacks a column, or a head that doesn't fit.
        """
        tokenizer = load_tokenizer(self._tokenizer)
        model = self.fabric.to_device(model).eval()
        report: dict[str, Any] = {"model_info": model_info(model, name)}
        for task, parts in self._tasks.items():
            dataset = instantiated(parts["dataset"])
            with one_clear_line():
                head, texts, labels = _head(parts["head"]), *examples(task, dataset)
                correct = self._correct(model, tokenizer, head, texts, labels, task)
            report[task] = {"accuracy": sum(correct) / len(correct), "samples": len(correct)}
            log.info("%s: %s", task, report[task])
        report["average"] = {"accuracy": statistics.fmean(report[task]["accuracy"] for task in self._tasks)}
        return report

    def _correct(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        head: Head,
        texts: Sequence[Text],
        labels: Sequence[int],
        task: str,
    ) -> list[bool]:
        """Whether each text, of all processes' ones, in their order, gets its class."""
        if max(labels) >= len(head.bias):
            raise SmileError(f"{task}: the head has {len(head.bias)} classes, a label is {max(labels)}")
        share = Share(alone=False)
        # the same batches for any number of processes: how texts are padded together changes the last digits
        starts = range(0, len(texts), self.batch_size)
        batches = [list(range(start, min(start + self.batch_size, len(texts)))) for start in starts]
        mine = batches[share.rank :: share.size]
        head = Head(*(tensor.to(self.fabric.device) for tensor in head))
        found: dict[int, bool] = {}
        for numbers in tqdm(mine[:1] if self.fast_dev_run else mine, desc=f"Evaluating {task}", leave=False):
            batch = batch_of(tokenizer, [texts[number] for number in numbers]).to(self.fabric.device)
            embedded = embed(model, batch).float()
            if embedded.shape[-1] != head.weight.shape[-1]:
                raise SmileError(f"{task}: the head takes {head.weight.shape[-1]} values, got {embedded.shape[-1]}")
            predicted = F.linear(embedded, head.weight, head.bias).argmax(dim=-1).tolist()
            found |= {n: p == labels[n] for n, p in zip(numbers, predicted, strict=True)}
        together = {number: right for part in share.exchange(found) for number, right in part.items()}
        return [together[number] for number in sorted(together)]


def _head(source: Any) -> Head:
    return Head.load(source) if isinstance(source, (str, Path)) else instantiated(source)


def examples(task: str, dataset: Any) -> tuple[list[Text], list[int]]:
    """The texts, or pairs of texts, and the class numbers of a data set.

    Raises:
        SmileError: if there are none, or a column is missing.
    """
    missing = {"text", "label"} - set(dataset.column_names)
    if missing:
        raise SmileError(f"the data set of {task} has no column {sorted(missing)[0]!r}")
    if not len(dataset):
        raise SmileError(f"the data set of {task} is empty")
    texts = list(dataset["text"])
    pairs = list(zip(texts, dataset["pair"], strict=True)) if "pair" in dataset.column_names else texts
    return pairs, list(dataset["label"])
