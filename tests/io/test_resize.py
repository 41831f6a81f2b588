"""``resize_token_embeddings`` of upscaled models: a routed head keeps its experts."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import experts_of, output, tied_llama
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fusion_bench_smile import SmileLinear, load, save, upscale

INPUTS = {"input_ids": torch.randint(0, 30, (3, 7), generator=torch.Generator().manual_seed(0))}


def llama() -> nn.Module:
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **size)).eval()


@pytest.mark.parametrize(
    ("options", "error"),
    [({"k": 4}, 0), ({"k": -1}, 0), ({"k": 4, "storage": "int8"}, 0.01), ({"k": 4, "storage": "int4"}, 0.15)],
)
@pytest.mark.parametrize("scope", ["token", "input"])
@pytest.mark.parametrize("size", [48, 32])
def test_a_routed_head_keeps_its_experts(size: int, scope: str, options: dict, error: float, tmp_path: Path) -> None:
    base = llama()
    model = upscale(base, experts_of(base), gate_k=2, routing_scope=scope, **options)
    before, head = output(model, INPUTS), model.lm_head
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.lm_head is head
    assert isinstance(head, SmileLinear)
    assert (model.config.vocab_size, head.out_features, len(head.weight)) == (size, size, size)
    after, kept = output(model, INPUTS), min(size, 40)
    assert after.shape[-1] == size
    if size > 40 or not error:
        torch.testing.assert_close(after[..., :kept], before[..., :kept])
    else:  # the smaller rows have smaller scales
        change = before[..., :kept] - output(base, INPUTS)[..., :kept]
        assert (after[..., :kept] - before[..., :kept]).norm() < error * change.norm()
    save(model, tmp_path / "model")
    assert torch.equal(output(load(tmp_path / "model").eval(), INPUTS), after)


def test_experts_do_not_change_new_tokens() -> None:
    base = llama()
    model = upscale(base, experts_of(base), gate_k=2, k=4, target_modules=["lm_head"])
    model.resize_token_embeddings(44)
    plain = copy.deepcopy(model)
    plain.lm_head = model.lm_head.to_plain_layer()
    torch.testing.assert_close(output(model, INPUTS)[..., 40:], output(plain, INPUTS)[..., 40:])


def test_a_plain_head_is_resized_as_ever() -> None:
    base = llama()
    model = upscale(base, experts_of(base), gate_k=2, k=4, exclude_modules=["lm_head"])
    before = output(model, INPUTS)
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    model.resize_token_embeddings(48)
    assert type(model.lm_head) is nn.Linear
    torch.testing.assert_close(output(model, INPUTS)[..., :40], before)


def test_a_tied_routed_head_keeps_its_experts(tmp_path: Path) -> None:
    base = tied_llama()
    model = upscale(base, experts_of(base, 2), gate_k=2, k=4)
    assert isinstance(model.lm_head, SmileLinear)
    before = output(model, INPUTS)
    model.resize_token_embeddings(48)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(output(model, INPUTS)[..., :40], before)
    save(model, tmp_path / "model")
    assert torch.equal(output(load(tmp_path / "model").eval(), INPUTS), output(model, INPUTS))


def test_copies_are_resized_alone() -> None:
    base = llama()
    model = upscale(base, experts_of(base), gate_k=2, k=4)
    copied = copy.deepcopy(model)
    copied.resize_token_embeddings(48)
    assert isinstance(copied.lm_head, SmileLinear)
    assert output(copied, INPUTS).shape[-1] == 48
    assert output(model, INPUTS).shape[-1] == 40
