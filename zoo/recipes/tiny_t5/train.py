"""Vocabulary, pretraining and fine-tuning of the tiny T5."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Sequence
from copy import deepcopy

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from fusion_bench_smile.framework.task_pools import Example

log = logging.getLogger(__name__)

VOCABULARY_SIZE, SENTINELS = 4000, 4
SPECIAL_TOKENS = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{number}>" for number in range(SENTINELS))]
STEPS, FINE_TUNING_STEPS, BATCH = 10000, 600, 32
LR, FINE_TUNING_LR = 2e-3, 3e-4
LOG_EVERY = 200  # steps
SPAN_CORRUPTION = 0.1  # share of the pretraining examples


def build_tokenizer(examples: Sequence[Example]) -> PreTrainedTokenizerFast:
    """Train a byte-pair vocabulary on the prompts and answers of the examples."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    raw.decoder = decoders.Metaspace()
    raw.train_from_iterator(
        (text for pair in examples for text in pair),
        trainers.BpeTrainer(vocab_size=VOCABULARY_SIZE, special_tokens=SPECIAL_TOKENS, show_progress=False),
    )
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=128,
        additional_special_tokens=SPECIAL_TOKENS[3:],
    )  # fmt: skip


def build_model(tokenizer: PreTrainedTokenizerBase) -> T5ForConditionalGeneration:
    """Initialise a T5 of hidden size 128 with three encoder and three decoder layers."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=128, d_kv=32, d_ff=384, num_layers=3, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def corrupt_spans(text: str, rng: random.Random) -> Example:
    """Replace up to two spans of two words by sentinels: the corrupted text and its target (Raffel et al., 2020)."""
    words = text.split()
    starts = sorted(rng.sample(range(0, max(len(words) - 1, 1), 4), min(2, (len(words) + 2) // 4)))
    prompt, answer, end = [], [], 0
    for number, start in enumerate(starts):
        sentinel = f"<extra_id_{number}>"
        prompt += [*words[end:start], sentinel]
        answer += [sentinel, *words[start : start + 2]]
        end = start + 2
    return " ".join([*prompt, *words[end:]]), " ".join(answer)


def pretrain(
    model: T5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Sequence[Example]],
    texts: Sequence[str],
) -> T5ForConditionalGeneration:
    """Train a model in place on all tasks, as Flan does, and on span corruption.

    Args:
        model: the model.
        tokenizer: of the model.
        tasks: training examples of each task.
        texts: for span corruption.
    """
    rng = random.Random(0)

    def batches() -> Iterator[list[Example]]:
        while True:
            yield [
                corrupt_spans(rng.choice(texts), rng)
                if rng.random() < SPAN_CORRUPTION
                else rng.choice(rng.choice(tasks))
                for _ in range(BATCH)
            ]

    return _trained(model, tokenizer, batches(), STEPS, LR)


def finetune(
    model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> T5ForConditionalGeneration:
    """Fine-tune a copy on one task; the embeddings, which SMILE keeps pretrained, are frozen."""
    rng = random.Random(0)
    tuned = deepcopy(model)
    tuned.shared.requires_grad_(False)
    batches = (rng.sample(examples, BATCH) for _ in range(FINE_TUNING_STEPS))
    return _trained(tuned, tokenizer, batches, FINE_TUNING_STEPS, FINE_TUNING_LR).requires_grad_(True)


def _trained(
    model: T5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterator[Sequence[Example]],
    steps: int,
    lr: float,
) -> T5ForConditionalGeneration:
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.05 * steps), 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    average = 0.0
    for step, batch in zip(range(steps), batches, strict=False):
        loss = model(**_model_inputs(tokenizer, batch)).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average = loss.item() if not step else 0.98 * average + 0.02 * loss.item()
        if (step + 1) % LOG_EVERY == 0:
            log.info("step %d of %d, loss %.3f", step + 1, steps, average)
    return model.eval()


def _model_inputs(tokenizer: PreTrainedTokenizerBase, batch: Sequence[Example]) -> dict[str, Tensor]:
    prompts, answers = ([example[column] for example in batch] for column in (0, 1))
    inputs = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
    labels = tokenizer(answers, padding=True, truncation=True, return_tensors="pt").input_ids
    labels = labels.masked_fill(labels == tokenizer.pad_token_id, -100)
    return {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask, "labels": labels}
