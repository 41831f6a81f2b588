"""Pretraining of the small CLIP on the corpus, with a byte-pair vocabulary trained on the captions."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

from recipes.images.corpus import PROMPTS, Corpus, augment, caption_variants
from recipes.images.tasks import SIZE
from smile_zoo.images.evaluate import MEAN, STD, normalize

log = logging.getLogger(__name__)

MAX_TOKENS = 24


def build_processor(corpus: Corpus, folder: Path) -> CLIPProcessor:
    """Train the byte-pair vocabulary on the captions; save tokenizer and image processor to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_vocabulary(_train_vocabulary(corpus), folder)
    tokenizer = CLIPTokenizerFast(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=MAX_TOKENS, pad_token="<|endoftext|>"
    )
    images = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )
    processor = CLIPProcessor(image_processor=images, tokenizer=tokenizer)
    processor.save_pretrained(folder)
    return processor


def _train_vocabulary(corpus: Corpus) -> Tokenizer:
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    words = Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1536,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(caption_variants(corpus), trainer)
    return bpe


def _write_vocabulary(bpe: Tokenizer, folder: Path) -> None:
    """Write a vocabulary as the files ``vocab.json`` and ``merges.txt`` of CLIP's tokenizer."""
    model = json.loads(bpe.to_str())["model"]
    vocab = model["vocab"]
    # CLIP's tokenizer also looks up the word-final form of every byte
    for byte in pre_tokenizers.ByteLevel.alphabet():
        vocab.setdefault(f"{byte}</w>", len(vocab))
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


def build_model(processor: CLIPProcessor) -> CLIPModel:
    """Initialise the CLIP: a vision tower of hidden size 384 with 4 layers, a text tower of 128 with 2 layers."""
    tokenizer = processor.tokenizer  # type: ignore[attr-defined]
    config = CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": MAX_TOKENS,
            "projection_dim": 128,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": 384,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "image_size": SIZE,
            "patch_size": 7,
            "projection_dim": 128,
        },
        projection_dim=128,
    )
    config._attn_implementation = "eager"  # the fastest for 17 tokens
    model = CLIPModel(config)
    # CLIP initialises positions with a twentieth of the norm of the patches; a training as short as this one would end
    # at a model that ignores positions
    nn.init.normal_(model.vision_model.embeddings.position_embedding.weight)
    return model


def image_embeds(model: CLIPModel, pixels: Tensor) -> Tensor:
    """Normalised image embeddings (N, D) of pixels (N, 3, 28, 28)."""
    return F.normalize(model.visual_projection(model.vision_model(pixels).pooler_output), dim=-1)


def text_embeds(model: CLIPModel, texts: Mapping[str, Tensor]) -> Tensor:
    """Normalised text embeddings (N, D) of tokenized prompts."""
    return F.normalize(model.text_projection(model.text_model(**texts).pooler_output), dim=-1)


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups of an optimizer: weight decay for matrices, none for vectors."""
    matrices = [p for p in module.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in module.parameters() if p.requires_grad and p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


STEPS, BATCH, TEXTS, LR, WARMUP, WEIGHT_DECAY = 12_000, 128, 64, 8e-4, 300, 0.1
LOG_EVERY, SAVE_EVERY = 100, 500  # steps
# Weight of the squared distance between the embeddings of a prompt and its caption. The classification loss leaves the
# geometry of the captions open, so that prompts which are no caption would get arbitrary embeddings.
ALIGNMENT = 10.0


class Sampler:
    """Samples images and tokenized prompts with the indices of their captions, as a function of seed and step.

    Args:
        corpus: sprites and captions.
        processor: its tokenizer is used.
        seed: of all samples.
    """

    def __init__(self, corpus: Corpus, processor: CLIPProcessor, seed: int) -> None:
        self.corpus, self.seed = corpus, seed
        self.tokenizer = processor.tokenizer  # type: ignore[attr-defined]
        self.probability = corpus.probability()
        self.captions = sorted(set(corpus.captions))
        number = {caption: i for i, caption in enumerate(self.captions)}
        self.number = torch.tensor([number[caption] for caption in corpus.captions])
        share = torch.from_numpy(self.probability)
        self.prior = share.new_zeros(len(self.captions)).index_add_(0, self.number, share).log().float()
        self.prompts = [
            [p.format(c) for p in PROMPTS[int(k)]] for c, k in zip(corpus.captions, corpus.kinds, strict=True)
        ]

    def images(self, step: int) -> tuple[Tensor, Tensor]:
        """Normalised pixels (BATCH, 3, 28, 28) and caption indices (BATCH,)."""
        rng = np.random.default_rng([self.seed, 0, step])
        index = rng.choice(len(self.probability), BATCH, p=self.probability)
        return normalize(augment(self.corpus, index, rng)), self.number[index]

    def texts(self, step: int) -> tuple[Mapping[str, Tensor], Tensor]:
        """Tokenized prompts (TEXTS, L), half of them with a full stop, and caption indices (TEXTS,)."""
        rng = np.random.default_rng([self.seed, 1, step])
        index = rng.choice(len(self.probability), TEXTS, p=self.probability)
        prompts = [self.prompts[i][int(rng.integers(len(self.prompts[i])))] + "." * int(rng.integers(2)) for i in index]
        return self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt"), self.number[index]


class Pretraining(nn.Module):
    """Pretraining loss of a CLIP model, with a table of one embedding per caption of the corpus.

    Images are compared with all captions. A contrastive loss compares them with the captions of their batch, and learns
    much less from small batches. The softmax gets the log frequency of the captions as a prior: cosines learn it
    slowly, and zero-shot heads do not need it. The text tower learns to map every prompt to the embedding of its
    caption.

    Args:
        model: the CLIP model, trained in place.
        prior: log probability of each caption, (C,).
    """

    prior: Tensor

    def __init__(self, model: CLIPModel, prior: Tensor) -> None:
        super().__init__()
        self.model = model
        self.table = nn.Embedding(len(prior), model.config.projection_dim)
        self.register_buffer("prior", prior, persistent=False)

    def forward(self, images: tuple[Tensor, Tensor], texts: tuple[Mapping[str, Tensor], Tensor]) -> Tensor:
        """Loss of a batch of images and a batch of prompts, each with caption indices: a scalar, float32."""
        table = F.normalize(self.table.weight, dim=-1)
        scale = self.model.logit_scale.exp().clamp(max=100)
        # with eager attention, bfloat16 is four times as fast as float32 on a CPU with bfloat16 instructions
        with torch.autocast("cpu", torch.bfloat16):
            of_images, of_texts = image_embeds(self.model, images[0]), text_embeds(self.model, texts[0])
        loss = F.cross_entropy(scale * of_images.float() @ table.T + self.prior, images[1])
        loss = loss + 0.5 * F.cross_entropy(scale * of_texts.float() @ table.T + self.prior, texts[1])
        return loss + 0.5 * ALIGNMENT * (of_texts.float() - table[texts[1]]).square().sum(1).mean()


def factor(step: int) -> float:
    """Learning rate of a step relative to the largest: linear warm-up, then cosine decay."""
    return min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * step / STEPS)) + 0.002)


def pretrain(corpus: Corpus, folder: Path, seed: int = 0) -> CLIPModel:
    """Train a CLIP model on the corpus and save it to `folder`.

    The state is saved beside `folder` every `SAVE_EVERY` steps; an interrupted run continues from there.
    """
    torch.manual_seed(seed)
    processor = build_processor(corpus, folder)
    sampler = Sampler(corpus, processor, seed)
    training = Pretraining(build_model(processor), sampler.prior).train()
    optimizer = torch.optim.AdamW(decay_groups(training, WEIGHT_DECAY), lr=LR, betas=(0.9, 0.98), eps=1e-6)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    state, file = {"training": training, "optimizer": optimizer, "schedule": schedule}, folder.with_suffix(".pt")
    start, started, average = _restore(state, file), time.perf_counter(), 0.0
    for step in range(start, STEPS):
        loss = training(sampler.images(step), sampler.texts(step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(training.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average = loss.item() if step == start else 0.98 * average + 0.02 * loss.item()
        if (step + 1) % LOG_EVERY == 0:
            pace = (time.perf_counter() - started) / (step + 1 - start)
            log.info("pretraining: step %d of %d, loss %.3f, %.2f s per step", step + 1, STEPS, average, pace)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == STEPS:
            _save(state, step + 1, file)
    training.model.eval().save_pretrained(folder)
    return training.model


def _save(state: Mapping[str, Any], step: int, file: Path) -> None:
    torch.save({**{name: part.state_dict() for name, part in state.items()}, "step": step}, file.with_suffix(".part"))
    file.with_suffix(".part").rename(file)


def _restore(state: Mapping[str, Any], file: Path) -> int:
    """Load a saved state; the number of steps that it has done, 0 without a file."""
    if not file.exists():
        return 0
    saved = torch.load(file, weights_only=True)
    for name, part in state.items():
        part.load_state_dict(saved[name])
    return saved["step"]
