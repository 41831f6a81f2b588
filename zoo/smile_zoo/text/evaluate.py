"""Text classification without the framework, for the recipe and the studies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from smile_zoo.heads import Head
from smile_zoo.text.task_pool import Text, mean_pooled_embeddings, text_examples, tokenize_batch


def arrays(dataset: Dataset, task: str) -> tuple[list[Text], Tensor]:
    """Texts or sentence pairs of a data set, and their labels (N,), int64."""
    texts, labels = text_examples(task, dataset)
    return texts, torch.tensor(labels)


@torch.inference_mode()
def embeddings(
    encoder: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], batch_size: int = 100
) -> Tensor:
    """Embeddings of N texts: (N, D), float32."""
    starts = range(0, len(texts), batch_size)
    return torch.cat(
        [
            mean_pooled_embeddings(encoder, tokenize_batch(tokenizer, texts[start : start + batch_size]))
            for start in starts
        ]
    )


def accuracy(
    encoder: nn.Module, tokenizer: PreTrainedTokenizerBase, head: Head, texts: Sequence[Text], labels: Tensor
) -> float:
    """Top-1 accuracy in percent on texts with labels (N,)."""
    predicted = F.linear(embeddings(encoder, tokenizer, texts), *head).argmax(dim=-1)
    return 100 * (predicted == labels).float().mean().item()
