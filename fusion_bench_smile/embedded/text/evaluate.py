"""Accuracy without the framework: for building and measuring the benchmark itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from ...text_classification import Head, Text, batch_of, embed, examples


def arrays(dataset: Dataset, task: str) -> tuple[list[Text], Tensor]:
    """Texts, or pairs of them, and labels (N,)."""
    texts, labels = examples(task, dataset)
    return texts, torch.tensor(labels)


@torch.inference_mode()
def embeddings(
    encoder: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], batch: int = 100
) -> Tensor:
    """(N, D), float32."""
    starts = range(0, len(texts), batch)
    return torch.cat([embed(encoder, batch_of(tokenizer, texts[start : start + batch])) for start in starts])


def accuracy(
    encoder: nn.Module, tokenizer: PreTrainedTokenizerBase, head: Head, texts: Sequence[Text], labels: Tensor
) -> float:
    """In percent."""
    predicted = F.linear(embeddings(encoder, tokenizer, texts), *head).argmax(dim=-1)
    return 100 * (predicted == labels).float().mean().item()
