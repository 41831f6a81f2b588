"""Small models, their inputs and experts, for all tests."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import; without it, tests of missing models retry for a minute

import pytest
import torch
from fork_server import ForkingPython
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)


def clip_tower() -> nn.Module:
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7
    )
    return CLIPVisionModel(config).eval()


def t5() -> nn.Module:
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
        dropout_rate=0.0, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def tied_llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def resnet() -> nn.Module:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    return ResNetForImageClassification(config).eval()


def convnext() -> nn.Module:
    config = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2, num_labels=5)
    return ConvNextForImageClassification(config).eval()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 12, bias=False)).eval()


def clip_inputs() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(6, 3, 28, 28)}


def t5_inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(1, 64, (4, 9)), "decoder_input_ids": torch.randint(1, 64, (4, 5))}


def mlp_inputs() -> dict[str, torch.Tensor]:
    return {"input": torch.randn(40, 20)}


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, torch.Tensor]]]] = {
    "clip": (clip_tower, clip_inputs),
    "t5": (t5, t5_inputs),
    "mlp": (mlp, mlp_inputs),
}


def perturbed(model: nn.Module, scale: float = 0.05, seed: int = 0) -> nn.Module:
    """A 'fine-tuned' copy: every parameter moved."""
    generator = torch.Generator().manual_seed(seed)
    expert = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in expert.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += (scale * noise).to(parameter.dtype)
    return expert


def experts_of(model: nn.Module, count: int = 3, scale: float = 0.05) -> list[nn.Module]:
    return [perturbed(model, scale, seed) for seed in range(1, count + 1)]


def output(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        result = model(**inputs)
    if isinstance(result, torch.Tensor):
        return result
    return result.logits if "logits" in result else result.last_hidden_state


def to_dtype(inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # full collections during the tests leave out what the imports made


def pytest_sessionfinish() -> None:
    """Wait for the end of the processes that ran command lines."""
    while ForkingPython.in_use:
        ForkingPython.in_use.pop().close()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Spread the files with tests of the command line evenly, so that each worker waits for as many processes."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    groups: dict[bool, list[list[pytest.Item]]] = {True: [], False: []}
    for tests in files.values():
        groups[any("cli" in item.keywords for item in tests)].append(tests)
    places = [(number / len(group), tests) for group in groups.values() for number, tests in enumerate(group)]
    items[:] = [item for _, tests in sorted(places, key=lambda place: place[0]) for item in tests]
