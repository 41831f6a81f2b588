"""Small models with random weights, their experts, and what identifies a model."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fusion_bench_smile import calibrate, metadata_of, upscale
from fusion_bench_smile.construction import tensor_digest

Model = TypeVar("Model", bound=nn.Module)
EXPERTS = ("first", "second")
RANKS: dict[str, Any] = {"gate_k": 2, "k": 4}
NUM_IMAGES = 4  # of each task, for calibration


def vision_tower() -> CLIPVisionModel:
    """A CLIP vision tower of 12 linear layers."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7
    )
    return CLIPVisionModel(config).eval()


def language_model() -> LlamaForCausalLM:
    """A Llama whose head is tied to its embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def perceptron() -> nn.Module:
    """A model that is none of transformers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 12, bias=False)).eval()


def fine_tuned(model: Model, seed: int, scale: float = 0.05) -> Model:
    """A copy with noise on all parameters."""
    generator = torch.Generator().manual_seed(seed)
    expert = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
    return expert


def experts_of(model: Model, version: int = 0) -> dict[str, Model]:
    """Two experts. Those of each version are others."""
    return {name: fine_tuned(model, 10 * version + number) for number, name in enumerate(EXPERTS, start=1)}


@cache
def upscaled_tower(version: int = 0, k: int = 4) -> nn.Module:
    """An upscaled vision tower."""
    base = vision_tower()
    return upscale(base, experts_of(base, version), gate_k=2, k=k)


@cache
def routed_tower(version: int = 0) -> nn.Module:
    """An upscaled vision tower with a router for whole inputs, calibrated by prototypes."""
    base, generator = vision_tower(), torch.Generator().manual_seed(version)
    model = upscale(base, experts_of(base, version), **RANKS, routing_scope="input", top_k=2)
    calibrate(
        model, {name: [{"pixel_values": torch.randn(NUM_IMAGES, 3, 28, 28, generator=generator)}] for name in EXPERTS}
    )
    return model


@cache
def upscaled_language_model(version: int = 0) -> nn.Module:
    """An upscaled Llama with factors of 8 bits."""
    base = language_model()
    return upscale(base, experts_of(base, version), **RANKS, storage="int8")


@cache
def upscaled_perceptron(version: int = 0) -> nn.Module:
    """An upscaled model that is none of transformers."""
    base = perceptron()
    return upscale(base, experts_of(base, version), **RANKS)


def identity(model: nn.Module) -> str:
    """What identifies an upscaled model bit for bit: its metadata and the digests of all tensors."""
    described = json.dumps(metadata_of(model).to_dict(), sort_keys=True)
    return "/".join([described, *digests(model.state_dict()).values()])


def digests(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Name → digest of some tensors, sorted by name."""
    return {name: tensor_digest(state[name]) for name in sorted(state)}


def same_tensors(model: nn.Module, expected: nn.Module) -> bool:
    """Whether a model has the tensors of another one and its layouts.

    Options may differ, also the dtype, which transformers takes from a config, and the names of the experts.
    """
    ours, theirs = metadata_of(model), metadata_of(expected)
    if ours.layouts != theirs.layouts or len(ours.experts) != len(theirs.experts):
        return False
    state, other = model.state_dict(), expected.state_dict()
    return state.keys() == other.keys() and all(_same(state[name], other[name]) for name in state)


def _same(tensor: Tensor, expected: Tensor) -> bool:
    if tensor.dtype != expected.dtype and tensor.is_floating_point() and expected.is_floating_point():
        expected = expected.to(tensor.dtype)
    return tensor_digest(tensor) == tensor_digest(expected)


def is_one_of(model: nn.Module, versions: Iterable[nn.Module]) -> bool:
    """Whether a model is one of some upscaled models, bit for bit."""
    return identity(model) in {identity(version) for version in versions}


def is_of_transformers(model: nn.Module) -> bool:
    """Whether a model is one of transformers, which loads without the pretrained model."""
    return isinstance(model, PreTrainedModel)
