"""Tokenizers of bytes, in the files of the language models' tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>")
VOCABULARY = 256 + len(SPECIAL)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each byte, and those for unknown text, start and end."""
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(), merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=256
    )


def save_gpt2_tokenizer(folder: Path) -> None:
    """Save such a tokenizer as GPT-2's, for which start, end and unknown text are one token."""
    end = "</s>"
    (folder / "vocab.json").write_text(json.dumps(_vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = {"vocab_file": str(folder / "vocab.json"), "merges_file": str(folder / "merges.txt")}
    GPT2TokenizerFast(**files, unk_token=end, bos_token=end, eos_token=end).save_pretrained(folder)


def _vocabulary() -> dict[str, int]:
    return {token: number for number, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL])}
