"""Tiny upscaled models of texts for the tests of serving, and a tokenizer of words for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from conftest import experts_of
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fusion_bench_smile import upscale

BY_INPUT = {"routing_scope": "input", "top_k": 2, "gate_k": 4, "k": 4}
TEXTS = ["a b c", "d e f g h i j k", "b", "k k k a", "c d"]
SEED = 5  # of a model that serves the texts by several experts


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(["</s>", "[UNK]", *"abcdefghijk"])}
    rust = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="</s>", unk_token="[UNK]")


def llama(layers: int = 4) -> nn.Module:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tokens(texts: Sequence[str]) -> dict[str, torch.Tensor]:
    padded = tokenizer()
    padded.pad_token = padded.eos_token
    found = padded(list(texts), padding=True, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def upscaled(base: nn.Module, **options: object) -> nn.Module:
    return upscale(base, experts_of(base), **{**BY_INPUT, **options}).eval()
