"""Pretrain the small CLIP on the corpus: contrastive, two towers, its own byte-pair vocabulary."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

from .corpus import PROMPTS, Corpus, augment, caption_variants
from .images import SIZE

log = logging.getLogger(__name__)

BATCH = 128
MAX_TOKENS = 24
MEAN, STD = 0.5, 0.25
# FLIP (arXiv 2212.00794): most steps see half of the patches only, which halves their cost
MASKED_UNTIL = 0.75


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
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, image_mean=[MEAN] * 3, image_std=[STD] * 3
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


def vision_features(model: CLIPModel, pixels: Tensor, keep: Tensor | None) -> Tensor:
    """Normalised image embeddings (N, 128); `keep` (N, P') selects the patches that are seen."""
    vision = model.vision_model
    hidden = vision.embeddings(pixels)  # (N, 1 + P, D)
    if keep is not None:
        index = torch.cat([torch.zeros_like(keep[:, :1]), keep + 1], dim=1)
        hidden = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
    hidden = vision.encoder(inputs_embeds=vision.pre_layrnorm(hidden)).last_hidden_state
    return F.normalize(model.visual_projection(vision.post_layernorm(hidden[:, 0])), dim=-1)


def normalize(images: Tensor) -> Tensor:
    return (images - MEAN) / STD


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """CLIP's symmetric loss; pairs with the same caption (`same`, (N, N)) are all positives."""
    logits = scale.exp().clamp(max=100) * images @ texts.T
    target = same.float() / same.sum(1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    matrices = [p for p in module.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in module.parameters() if p.requires_grad and p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def pretrain(corpus: Corpus, folder: Path, steps: int, seed: int = 0) -> CLIPModel:
    """Train for `steps` and save the model into `folder`; a killed run goes on from its last state."""
    torch.manual_seed(seed)
    processor = build_processor(corpus, folder)
    model = build_model(processor)
    prompts = [[p.format(c) for p in PROMPTS[int(k)]] for c, k in zip(corpus.captions, corpus.kinds, strict=True)]
    optimizer = torch.optim.AdamW(decay_groups(model, 0.1), lr=8e-4, betas=(0.9, 0.98), eps=1e-6)
    warmup = min(300, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(s, steps) / steps)) + 0.01)
    )
    start, state = 0, folder.parent / "pretrain.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        start = saved["step"]
    probability = corpus.weights / corpus.weights.sum()
    patches = model.vision_model.embeddings.num_patches
    began, running = time.perf_counter(), 0.0
    model.train()
    for step in range(start, steps):
        rng = np.random.default_rng([seed, step])
        index = rng.choice(len(corpus.captions), BATCH, p=probability)
        images, prompt = augment(corpus, index, rng)
        texts = processor.tokenizer(
            [prompts[i][p] for i, p in zip(index, prompt, strict=True)], padding=True, truncation=True, return_tensors="pt"
        )
        ids = {c: n for n, c in enumerate({corpus.captions[i] for i in index})}
        caption = torch.tensor([ids[corpus.captions[i]] for i in index])
        keep = None
        if step < MASKED_UNTIL * steps:
            noise = torch.from_numpy(rng.random((BATCH, patches)))
            keep = noise.argsort(1)[:, : patches // 2]
        image_features = vision_features(model, normalize(images), keep)
        text_features = F.normalize(model.text_projection(model.text_model(**texts).pooler_output), dim=-1)
        loss = contrastive_loss(image_features, text_features, model.logit_scale, caption[:, None] == caption[None])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running = 0.98 * running + 0.02 * loss.item() if step > start else loss.item()
        if (step + 1) % 100 == 0:
            log.info("step %d/%d loss %.3f, %.2f s a step", step + 1, steps, running, (time.perf_counter() - began) / (step + 1 - start))
        if (step + 1) % 500 == 0 or step + 1 == steps:
            torch.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "step": step + 1},
                state.with_suffix(".part"),
            )
            state.with_suffix(".part").rename(state)
    model.eval().save_pretrained(folder)
    return model
