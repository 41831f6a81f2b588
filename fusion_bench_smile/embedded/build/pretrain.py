"""Pretrain the small CLIP on the corpus: two towers in one embedding space, its own byte-pair vocabulary."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

from ..evaluate import MEAN, STD, normalize
from .corpus import PROMPTS, Corpus, augment, caption_variants
from .images import SIZE

log = logging.getLogger(__name__)

MAX_TOKENS = 24


def build_processor(corpus: Corpus, folder: Path) -> CLIPProcessor:
    """Train the byte-pair vocabulary on the captions and save tokenizer and image processor into `folder`."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_word_pattern(), behavior="removed", invert=True),
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
    folder.mkdir(parents=True, exist_ok=True)
    model = json.loads(bpe.to_str())["model"]
    vocab = model["vocab"]
    # CLIP's tokenizer looks every byte up in its word-final form too
    for byte in pre_tokenizers.ByteLevel.alphabet():
        vocab.setdefault(f"{byte}</w>", len(vocab))
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
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


def _word_pattern() -> object:
    from tokenizers import Regex

    return Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")


def build_model(processor: CLIPProcessor) -> CLIPModel:
    tokenizer = processor.tokenizer
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
    # CLIP's own initialisation makes positions a twentieth of what the patches are: a training as short as this one
    # then ends at a model that hardly knows where a patch lies
    nn.init.normal_(model.vision_model.embeddings.position_embedding.weight)
    return model


def image_embeds(model: CLIPModel, pixels: Tensor) -> Tensor:
    """Normalised image embeddings (N, D) of pixels (N, 3, 28, 28)."""
    return F.normalize(model.visual_projection(model.vision_model(pixels).pooler_output), dim=-1)


def text_embeds(model: CLIPModel, texts: Mapping[str, Tensor]) -> Tensor:
    """Normalised text embeddings (N, D) of tokenized prompts."""
    return F.normalize(model.text_projection(model.text_model(**texts).pooler_output), dim=-1)


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    matrices = [p for p in module.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in module.parameters() if p.requires_grad and p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


STEPS, BATCH, TEXTS, LR, WARMUP, WEIGHT_DECAY = 12_000, 128, 64, 8e-4, 300, 0.1
# Pulls a prompt's embedding to its caption's. Ranking the captions right leaves their geometry open, and prompts that
# were never seen as captions then fall anywhere.
ALIGNMENT = 10.0


class Sampler:
    """Draws images and tokenized prompts with the numbers of their captions; the same for the same seed and step."""

    def __init__(self, corpus: Corpus, processor: CLIPProcessor, seed: int) -> None:
        self.corpus, self.tokenizer, self.seed = corpus, processor.tokenizer, seed
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
        """Pixels (BATCH, 3, 28, 28) and caption numbers (BATCH,)."""
        rng = np.random.default_rng([self.seed, 0, step])
        index = rng.choice(len(self.probability), BATCH, p=self.probability)
        return normalize(augment(self.corpus, index, rng)), self.number[index]

    def texts(self, step: int) -> tuple[Mapping[str, Tensor], Tensor]:
        """Tokenized prompts (TEXTS, L), half of them with a full stop, and caption numbers (TEXTS,)."""
        rng = np.random.default_rng([self.seed, 1, step])
        index = rng.choice(len(self.probability), TEXTS, p=self.probability)
        chosen = [self.prompts[i][int(rng.integers(len(self.prompts[i])))] + "." * int(rng.integers(2)) for i in index]
        return self.tokenizer(chosen, padding=True, truncation=True, return_tensors="pt"), self.number[index]


class Pretraining(nn.Module):
    """A CLIP model and a table with one embedding for every caption of the corpus.

    Images are compared with all captions rather than with those of their batch, as a contrastive loss does: small
    batches then teach much more. How often a caption is drawn is given to the softmax (`prior`, log probabilities):
    cosines learn it slowly, and zero-shot heads don't want it. The text tower learns to give every prompt the embedding
    of its caption.
    """

    def __init__(self, model: CLIPModel, prior: Tensor) -> None:
        super().__init__()
        self.model = model
        self.table = nn.Embedding(len(prior), model.config.projection_dim)
        self.register_buffer("prior", prior, persistent=False)

    def forward(self, images: tuple[Tensor, Tensor], texts: tuple[Mapping[str, Tensor], Tensor]) -> Tensor:
        table = F.normalize(self.table.weight, dim=-1)
        scale = self.model.logit_scale.exp().clamp(max=100)
        # with plain attention four times as fast as float32 on a CPU that has bfloat16 instructions
        with torch.autocast("cpu", torch.bfloat16):
            seen, read = image_embeds(self.model, images[0]), text_embeds(self.model, texts[0])
        loss = F.cross_entropy(scale * seen.float() @ table.T + self.prior, images[1])
        loss = loss + 0.5 * F.cross_entropy(scale * read.float() @ table.T + self.prior, texts[1])
        return loss + 0.5 * ALIGNMENT * (read.float() - table[texts[1]]).square().sum(1).mean()


def factor(step: int) -> float:
    """The learning rate of a step, as a part of the largest one: linear warm-up, then a cosine."""
    return min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * step / STEPS)) + 0.002)


def pretrain(corpus: Corpus, folder: Path, seed: int = 0) -> CLIPModel:
    """Train and save the model into `folder`; a killed run goes on from its last state, beside `folder`."""
    torch.manual_seed(seed)
    processor = build_processor(corpus, folder)
    sampler = Sampler(corpus, processor, seed)
    training = Pretraining(build_model(processor), sampler.prior).train()
    optimizer = torch.optim.AdamW(decay_groups(training, WEIGHT_DECAY), lr=LR, betas=(0.9, 0.98), eps=1e-6)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    parts = {"training": training, "optimizer": optimizer, "schedule": schedule}
    file, start = folder.with_suffix(".pt"), 0
    if file.exists():
        saved = torch.load(file, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        start = saved["step"]
    began, running = time.perf_counter(), 0.0
    for step in range(start, STEPS):
        loss = training(sampler.images(step), sampler.texts(step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(training.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running = loss.item() if step == start else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            pace = (time.perf_counter() - began) / (step + 1 - start)
            log.info("pretraining: step %d of %d, loss %.3f, %.2f s a step", step + 1, STEPS, running, pace)
        if (step + 1) % 500 == 0 or step + 1 == STEPS:
            torch.save({**{n: p.state_dict() for n, p in parts.items()}, "step": step + 1}, file.with_suffix(".part"))
            file.with_suffix(".part").rename(file)
    training.model.eval().save_pretrained(folder)
    return training.model
