"""Heads and experts: a linear probe of the pretrained encoder, then fine-tuning in full or with LoRA."""

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

from ....text_classification import Head, Text, batch_of, embed
from ..evaluate import embeddings


@dataclass(frozen=True)
class Recipe:
    """How far a fine-tuning goes."""

    lr: float
    epochs: int
    batch: int = 32


RECIPES = {"full": Recipe(lr=5e-5, epochs=3), "lora": Recipe(lr=5e-4, epochs=3)}
LORA_RANK = 8
TOGETHER = 8  # texts of a batch that are computed at a time
# SMILE routes linear layers and keeps the rest pretrained; the embeddings, half of the parameters, stay as they are
STEM = "embeddings."


def probe(encoder: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], labels: Tensor) -> Head:
    """A logistic regression on what the encoder makes of the texts."""
    fitted = LogisticRegression(max_iter=2000).fit(embeddings(encoder, tokenizer, texts).numpy(), labels.numpy())
    weight, bias = torch.tensor(fitted.coef_), torch.tensor(fitted.intercept_)
    if len(weight) == 1:  # two classes: the decision function of the second
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    return Head(weight.float(), bias.float())


def _batches(count: int, recipe: Recipe, seed: int) -> Iterator[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(recipe.epochs):
        order = torch.randperm(count, generator=generator)
        yield from (part.tolist() for part in order[: count - count % recipe.batch].split(recipe.batch))


def finetune(
    encoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    head: Head,
    texts: Sequence[Text],
    labels: Tensor,
    kind: str,
    seed: int = 0,
) -> tuple[PreTrainedModel | PeftModel, Head]:
    """A fine-tuned copy of the encoder (for ``"lora"`` a `PeftModel`), and the head that was trained with it."""
    torch.manual_seed(seed)
    tuned: PreTrainedModel | PeftModel = deepcopy(encoder)
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad_(not name.startswith(STEM))
    if kind == "lora":
        config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=linear_layers(encoder))
        tuned = get_peft_model(tuned, config)
    tuned.train()
    recipe = RECIPES[kind]
    weight, bias = nn.Parameter(head.weight.clone()), nn.Parameter(head.bias.clone())
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([*trained, weight, bias], lr=recipe.lr, weight_decay=0.0)
    steps = recipe.epochs * (len(texts) // recipe.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    for index in _batches(len(texts), recipe, seed):
        # texts of about the same length together: the same loss, with much less padding to compute
        index.sort(key=lambda i: len(str(texts[i])))
        parts = [index[start : start + TOGETHER] for start in range(0, len(index), TOGETHER)]
        with torch.autocast("cpu", torch.bfloat16):
            pooled = torch.cat([embed(tuned, batch_of(tokenizer, [texts[i] for i in part])) for part in parts])
        loss = F.cross_entropy(F.linear(pooled.float(), weight, bias), labels[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    return tuned.requires_grad_(True).eval(), Head(weight.detach(), bias.detach())


def linear_layers(encoder: nn.Module) -> list[str]:
    """The encoder's linear layers; the pooler behind them isn't used."""
    return [n for n, m in encoder.named_modules() if isinstance(m, nn.Linear) and n.startswith("encoder.")]
