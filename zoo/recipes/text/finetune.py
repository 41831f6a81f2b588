"""Fine-tuning of heads and encoders: a linear probe first, then in full or with LoRA."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smile_zoo.heads import Head
from smile_zoo.text.evaluate import embeddings
from smile_zoo.text.task_pool import Text, mean_pooled_embeddings, tokenize_batch


@dataclass(frozen=True)
class FineTuning:
    """Hyperparameters of a fine-tuning with AdamW.

    Attributes:
        lr: largest learning rate.
        epochs: over the training split.
        batch_size: texts per step.
    """

    lr: float
    epochs: int
    batch_size: int = 32


FINE_TUNINGS = {"full": FineTuning(lr=5e-5, epochs=3), "lora": FineTuning(lr=5e-4, epochs=3)}
LORA_RANK = 8
MICRO_BATCH = 8  # texts per forward pass
# the embeddings, half of the parameters, are frozen: SMILE routes linear layers and keeps all others pretrained
FROZEN = "embeddings."


def probe(encoder: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], labels: Tensor) -> Head:
    """Fit a logistic regression on the encoder's embeddings of N texts with labels (N,)."""
    model = LogisticRegression(max_iter=2000).fit(embeddings(encoder, tokenizer, texts).numpy(), labels.numpy())
    weight, bias = torch.tensor(model.coef_), torch.tensor(model.intercept_)
    if len(weight) == 1:  # for two classes, scikit-learn has the decision function of the second one alone
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    return Head(weight.float(), bias.float())


def _batches(count: int, settings: FineTuning, seed: int) -> Iterator[list[int]]:
    generator, size = torch.Generator().manual_seed(seed), settings.batch_size
    for _ in range(settings.epochs):
        order = torch.randperm(count, generator=generator)
        yield from (batch.tolist() for batch in order[: count - count % size].split(size))


def finetune(
    encoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    head: Head,
    texts: Sequence[Text],
    labels: Tensor,
    kind: str,
    seed: int = 0,
) -> tuple[PreTrainedModel | PeftModel, Head]:
    """Fine-tune a copy of an encoder together with a head.

    Args:
        encoder: the pretrained encoder; it is not changed.
        tokenizer: of the encoder.
        head: initial head; it is not changed.
        texts: of the training split, N.
        labels: class indices, (N,).
        kind: ``"full"`` or ``"lora"``.
        seed: of the initialisation and the batches.

    Returns:
        The encoder, for ``"lora"`` a `PeftModel`, and the head.
    """
    torch.manual_seed(seed)
    tuned, settings = _trainable(encoder, kind).train(), FINE_TUNINGS[kind]
    weight, bias = nn.Parameter(head.weight.clone()), nn.Parameter(head.bias.clone())
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([*trained, weight, bias], lr=settings.lr, weight_decay=0.0)
    steps = settings.epochs * (len(texts) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    for index in _batches(len(texts), settings, seed):
        # micro-batches of texts of similar length: the same loss with much less padding
        index.sort(key=lambda i: len(str(texts[i])))
        parts = [index[start : start + MICRO_BATCH] for start in range(0, len(index), MICRO_BATCH)]
        with torch.autocast("cpu", torch.bfloat16):
            pooled = torch.cat(
                [mean_pooled_embeddings(tuned, tokenize_batch(tokenizer, [texts[i] for i in part])) for part in parts]
            )
        loss = F.cross_entropy(F.linear(pooled.float(), weight, bias), labels[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    return tuned.requires_grad_(True).eval(), Head(weight.detach(), bias.detach())


def _trainable(encoder: PreTrainedModel, kind: str) -> PreTrainedModel | PeftModel:
    tuned = deepcopy(encoder)
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad_(not name.startswith(FROZEN))
    if kind == "full":
        return tuned
    config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=linear_layers(encoder))
    return get_peft_model(tuned, config)


def linear_layers(encoder: nn.Module) -> list[str]:
    """Names of the encoder's linear layers, without the pooler, which no task uses."""
    return [n for n, m in encoder.named_modules() if isinstance(m, nn.Linear) and n.startswith("encoder.")]
