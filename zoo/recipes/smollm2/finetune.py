"""Fine-tuning of causal language models on answers, in full or with LoRA."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class FineTuning:
    """Hyperparameters of a fine-tuning with AdamW.

    Attributes:
        lr: largest learning rate.
        steps: number of steps.
        batch_size: examples per step.
    """

    lr: float
    steps: int
    batch_size: int = 12


FINE_TUNINGS = {"full": FineTuning(lr=5e-5, steps=40), "lora": FineTuning(lr=1e-3, steps=60)}
LORA_RANK = 8
WARM_UP = 5  # steps
IGNORED = -100


def finetune(
    pretrained: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[tuple[str, str]],
    kind: str,
    seed: int = 0,
) -> PreTrainedModel | PeftModel:
    """Fine-tune a copy of a model on the answers, each of which ends with a line break.

    Args:
        pretrained: a causal language model with a tied output head; it is not changed.
        tokenizer: of the model.
        examples: prompts and answers.
        kind: ``"full"``: the matrices of all blocks; or ``"lora"``: adapters of them.
        seed: of the initialisation and the batches.

    Returns:
        The model, for ``"lora"`` a `PeftModel`.
    """
    torch.manual_seed(seed)
    tuned, settings = _trainable(pretrained, kind).train(), FINE_TUNINGS[kind]
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP, 0.5 * (1 + math.cos(math.pi * step / settings.steps)))
    )
    for batch in _batches(len(examples), settings, seed):
        loss = answer_loss(tuned, *tokenized(tokenizer, [examples[index] for index in batch]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    return tuned.requires_grad_(True).eval()


def _batches(count: int, settings: FineTuning, seed: int) -> Iterator[list[int]]:
    generator, order = torch.Generator().manual_seed(seed), list[int]()
    for _ in range(settings.steps):
        if len(order) < settings.batch_size:
            order = torch.randperm(count, generator=generator).tolist()
        yield order[: settings.batch_size]
        order = order[settings.batch_size :]


def tokenized(tokenizer: PreTrainedTokenizerBase, examples: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Token ids and labels of N examples, both (N, tokens), padded on the right; labels ignore the prompts."""
    rows, labels = [], []
    for prompt, answer in examples:
        start, end = tokenizer(prompt).input_ids, tokenizer(f" {answer}\n").input_ids
        rows.append(torch.tensor(start + end))
        labels.append(torch.tensor([IGNORED] * len(start) + end))
    padding = float(tokenizer.pad_token_id)
    return pad_sequence(rows, True, padding), pad_sequence(labels, True, IGNORED)


def answer_loss(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of the answers' tokens; tokens and labels are (N, tokens).

    Padding on the right is not masked: no token of an answer attends to it.
    """
    causal: Any = model.base_model.model if isinstance(model, PeftModel) else model
    with torch.autocast("cpu", torch.bfloat16):
        hidden = causal.model(input_ids=tokens).last_hidden_state[:, :-1]  # (N, tokens − 1, D)
        expected = labels[:, 1:]
        logits = causal.lm_head(hidden[expected != IGNORED])  # (answer tokens, V)
    return F.cross_entropy(logits.float(), expected[expected != IGNORED])


def _trainable(pretrained: PreTrainedModel, kind: str) -> PreTrainedModel | PeftModel:
    tuned = deepcopy(pretrained).requires_grad_(False)
    tuned.set_attn_implementation("eager")  # for short sequences the gradient of the fused kernel is slower
    layers = [tuned.get_submodule(name) for name in linear_layers(tuned)]
    if kind == "full":
        for layer in layers:
            layer.requires_grad_(True)
        return tuned
    for layer in layers:
        layer.to(torch.bfloat16)  # as autocast would in every step
    return get_peft_model(tuned, LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=linear_layers(tuned)))


def linear_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers of all blocks, without the output head."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
