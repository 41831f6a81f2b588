"""Pretrain the small CLIP on the corpus: two towers in one embedding space, its own byte-pair vocabulary."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    return CLIPModel(config)


def image_embeds(model: CLIPModel, pixels: Tensor, keep: Tensor | None = None) -> Tensor:
    """Normalised image embeddings (N, D) of pixels (N, 3, 28, 28); `keep` (N, P') selects the patches that are seen."""
    vision = model.vision_model
    hidden = vision.embeddings(pixels)  # (N, 1 + P, H)
    if keep is not None:
        index = torch.cat([torch.zeros_like(keep[:, :1]), keep + 1], dim=1)
        hidden = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
    hidden = vision.encoder(inputs_embeds=vision.pre_layrnorm(hidden)).last_hidden_state
    return F.normalize(model.visual_projection(vision.post_layernorm(hidden[:, 0])), dim=-1)


def text_embeds(model: CLIPModel, texts: Mapping[str, Tensor]) -> Tensor:
    """Normalised text embeddings (N, D) of tokenized prompts."""
    return F.normalize(model.text_projection(model.text_model(**texts).pooler_output), dim=-1)


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    matrices = [p for p in module.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in module.parameters() if p.requires_grad and p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


@dataclass(frozen=True)
class Stage:
    """One stage of pretraining; its learning rate warms up and then falls along a cosine towards `horizon` steps."""

    name: str
    steps: int
    horizon: int
    batch: int
    lr: float
    warmup: int

    def factor(self, step: int) -> float:
        return min(
            (step + 1) / self.warmup, 0.5 * (1 + math.cos(math.pi * min(step, self.horizon) / self.horizon)) + 0.01
        )


# FLIP (arXiv 2212.00794): the contrastive stage sees half of the patches, which halves its cost. The second stage
# replaces the other pairs of the batch by the embeddings of all captions: small batches then teach much faster.
CONTRASTIVE = Stage("contrastive", steps=2000, horizon=7000, batch=128, lr=8e-4, warmup=300)
REFINING = Stage("refining", steps=5600, horizon=5600, batch=64, lr=6e-4, warmup=200)
ALIGNING = Stage("aligning", steps=1200, horizon=1200, batch=128, lr=1e-3, warmup=100)  # the text tower alone


class Sampler:
    """Draws batches: pixels, tokenized prompts and caption numbers; the same for the same seed and step."""

    def __init__(self, corpus: Corpus, processor: CLIPProcessor, weights: np.ndarray, batch: int, seed: int) -> None:
        self.corpus, self.tokenizer, self.batch, self.seed = corpus, processor.tokenizer, batch, seed
        self.probability = weights / weights.sum()
        self.names = sorted(set(corpus.captions))
        number = {caption: i for i, caption in enumerate(self.names)}
        self.number = torch.tensor([number[caption] for caption in corpus.captions])
        self.prompts = [
            [p.format(c) for p in PROMPTS[int(k)]] for c, k in zip(corpus.captions, corpus.kinds, strict=True)
        ]

    def draw(self, step: int) -> tuple[Tensor, Mapping[str, Tensor], Tensor, np.random.Generator]:
        rng = np.random.default_rng([self.seed, step])
        index = rng.choice(len(self.probability), self.batch, p=self.probability)
        images, prompt = augment(self.corpus, index, rng)
        chosen = [self.prompts[i][p] for i, p in zip(index, prompt, strict=True)]
        return normalize(images), self.tokenize(chosen), self.number[index], rng

    def draw_texts(self, step: int) -> tuple[Mapping[str, Tensor], Tensor]:
        """Prompts, half of them with a full stop, and caption numbers: captions by weight, prompts evenly."""
        rng = np.random.default_rng([self.seed, 1, step])
        index = rng.choice(len(self.probability), self.batch, p=self.probability)
        chosen = [self.prompts[i][int(rng.integers(len(self.prompts[i])))] + "." * int(rng.integers(2)) for i in index]
        return self.tokenize(chosen), self.number[index]

    def tokenize(self, texts: list[str]) -> Mapping[str, Tensor]:
        return self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")


def pretrain(corpus: Corpus, folder: Path, seed: int = 0) -> CLIPModel:
    """Train all stages and save the model into `folder`; a killed run goes on from its last state."""
    torch.manual_seed(seed)
    processor = build_processor(corpus, folder)
    model = build_model(processor)
    _train_contrastive(model, Sampler(corpus, processor, corpus.weights, CONTRASTIVE.batch, seed), folder.parent)
    refined = corpus.refined_weights()
    table = _train_refining(model, Sampler(corpus, processor, refined, REFINING.batch, seed + 7), folder.parent)
    _train_aligning(model, table, Sampler(corpus, processor, refined**0.5, ALIGNING.batch, seed), folder.parent)
    model.eval().save_pretrained(folder)
    return model


def _train_contrastive(model: CLIPModel, sampler: Sampler, folder: Path) -> None:
    patches = model.vision_model.embeddings.num_patches

    def loss(step: int) -> Tensor:
        pixels, texts, captions, rng = sampler.draw(step)
        keep = torch.from_numpy(rng.random((len(pixels), patches))).argsort(1)[:, : patches // 2]
        logits = (
            model.logit_scale.exp().clamp(max=100) * image_embeds(model, pixels, keep) @ text_embeds(model, texts).T
        )
        same = (captions[:, None] == captions[None]).float()  # pairs with the same caption are all positives
        target = same / same.sum(1, keepdim=True)
        return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))

    _train(CONTRASTIVE, model, loss, folder, weight_decay=0.1)


def _train_refining(model: CLIPModel, sampler: Sampler, folder: Path) -> Tensor:
    table = nn.Embedding(len(sampler.names), model.config.projection_dim)
    with torch.no_grad():
        parts = [sampler.names[i : i + 500] for i in range(0, len(sampler.names), 500)]
        table.weight.copy_(torch.cat([text_embeds(model, sampler.tokenize(part)) for part in parts]))
        table.weight.mul_(math.sqrt(model.config.projection_dim))

    def loss(step: int) -> Tensor:
        pixels, texts, captions, _ = sampler.draw(step)
        scaled = model.logit_scale.exp().clamp(max=100) * F.normalize(table.weight, dim=-1).T
        images = F.cross_entropy(image_embeds(model, pixels) @ scaled, captions)
        return images + 0.5 * F.cross_entropy(text_embeds(model, texts) @ scaled, captions)

    _train(REFINING, nn.ModuleDict({"model": model, "table": table}), loss, folder, weight_decay=0.05)
    return F.normalize(table.weight.detach(), dim=-1)


def _train_aligning(model: CLIPModel, table: Tensor, sampler: Sampler, folder: Path) -> None:
    """Bring each prompt's embedding to its caption's: ranking the captions right leaves their geometry open."""
    texts = nn.ModuleDict({"text": model.text_model, "projection": model.text_projection})
    scale = model.logit_scale.detach().exp()

    def loss(step: int) -> Tensor:
        prompts, captions = sampler.draw_texts(step)
        embeds = text_embeds(model, prompts)
        distance = (embeds - table[captions]).square().sum(1).mean()
        return 10 * distance + F.cross_entropy(scale * embeds @ table.T, captions)

    _train(ALIGNING, texts, loss, folder, weight_decay=0.01)


def _train(
    stage: Stage, module: nn.Module, loss_of: Callable[[int], Tensor], folder: Path, weight_decay: float
) -> None:
    optimizer = torch.optim.AdamW(decay_groups(module, weight_decay), lr=stage.lr, betas=(0.9, 0.98), eps=1e-6)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, stage.factor)
    parts = {"module": module, "optimizer": optimizer, "schedule": schedule}
    file, start = folder / f"pretrain-{stage.name}.pt", 0
    if file.exists():
        saved = torch.load(file, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        start = saved["step"]
    began, running = time.perf_counter(), 0.0
    module.train()
    for step in range(start, stage.steps):
        loss = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running = loss.item() if step == start else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            pace = (time.perf_counter() - began) / (step + 1 - start)
            log.info("%s: step %d of %d, loss %.3f, %.2f s a step", stage.name, step + 1, stage.steps, running, pace)
        if (step + 1) % 500 == 0 or step + 1 == stage.steps:
            torch.save({**{n: p.state_dict() for n, p in parts.items()}, "step": step + 1}, file.with_suffix(".part"))
            file.with_suffix(".part").rename(file)
