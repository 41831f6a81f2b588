"""Experts of another vocabulary: the rows that both models have are used, and a head of another size is not."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import perturbed, tied_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fusion_bench_smile import (
    PlanError,
    add_expert,
    load,
    metadata_of,
    save,
    upscale,
    upscale_to_folder,
)
from fusion_bench_smile.construction import plan_upscaling
from fusion_bench_smile.io import ResizedSource, StateDictSource
from fusion_bench_smile.nn import routed_layers

OPTIONS = {"gate_k": 2, "k": 4}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def llama(**options: object) -> LlamaForCausalLM:
    config = LlamaConfig(**{
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, **options,
    })  # fmt: skip
    return LlamaForCausalLM(config).eval()


def with_vocabulary(model: nn.Module, size: int, seed: int = 1) -> nn.Module:
    """A fine-tuned copy with another number of tokens."""
    expert = perturbed(model, seed=seed)
    expert.resize_token_embeddings(size, mean_resizing=False)
    return expert


def cut(expert: nn.Module, pretrained: nn.Module) -> nn.Module:
    """The expert with the pretrained vocabulary and head."""
    result, state = copy.deepcopy(pretrained), expert.state_dict()
    size, start = len(state[EMBEDDING]), pretrained.state_dict()
    state[EMBEDDING] = torch.cat([state[EMBEDDING][:40], start[EMBEDDING][size:]])
    state[HEAD] = start[HEAD]
    result.load_state_dict(state)
    return result


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def in_folder(expert: nn.Module, folder: Path) -> Path:
    expert.save_pretrained(folder)
    return folder


KINDS: dict[str, Callable[[nn.Module, Path], object]] = {
    "module": lambda expert, _: expert,
    "state dict": lambda expert, _: expert.state_dict(),
    "folder": in_folder,
    "function": lambda expert, _: lambda: expert,
}


@pytest.mark.parametrize("size", [37, 42])
@pytest.mark.parametrize("kind", KINDS)
def test_the_shared_rows_are_used_and_the_head_is_kept(kind, size, tmp_path, caplog):
    base = llama()
    expert = with_vocabulary(base, size)
    with caplog.at_level(logging.WARNING):
        model = upscale(base, {"math": KINDS[kind](expert, tmp_path), "chat": perturbed(base, seed=2)}, **OPTIONS)
    expected = upscale(base, {"math": cut(expert, base), "chat": perturbed(base, seed=2)}, **OPTIONS)
    assert same(model, expected)
    assert model.lm_head.layout.ranks == (0, 4)
    change = metadata_of(model).provenance.changes["math"]
    assert change == metadata_of(expected).provenance.changes["math"]
    (line,) = [record.getMessage() for record in caplog.records if "another size" in record.getMessage()]
    assert line == (
        f"expert 'math' has tensors of another size: {EMBEDDING} ({size} rows instead of 40), {HEAD} ({size} rows "
        f"instead of 40); the rows that both have are used, and {HEAD} is left as pretrained"
    )


def test_a_plan_accepts_what_an_upscaling_does(caplog):
    base = llama()
    plan = plan_upscaling(base, {"math": with_vocabulary(base, 42)}, **OPTIONS)
    assert len(plan.layers) == 8
    assert "another size" in caplog.text


def test_the_head_alone_is_upscaled_for_no_expert_of_another_size():
    base = llama()
    experts = {name: with_vocabulary(base, 42, seed) for seed, name in enumerate("ab", 1)}
    layers = routed_layers(upscale(base, experts, **OPTIONS))
    assert "lm_head" not in layers
    assert len(layers) == 7


def test_shared_rows_are_averaged():
    base = llama()
    experts = {"a": with_vocabulary(base, 42), "b": with_vocabulary(base, 37, 2), "c": perturbed(base, seed=3)}
    options = {"exclude_modules": ["lm_head"], "average_experts": True}
    model, start = upscale(base, experts, **OPTIONS, **options), base.state_dict()
    for name in (EMBEDDING, HEAD):
        rows = [
            torch.cat([e.state_dict()[name][:40], start[name][len(e.state_dict()[name]) :]]) for e in experts.values()
        ]
        torch.testing.assert_close(model.state_dict()[name], torch.stack(rows).mean(0))


def test_a_tied_head_of_another_size_is_kept():
    base = tied_llama()
    model = upscale(base, {"math": with_vocabulary(base, 42), "chat": perturbed(base, seed=2)}, **OPTIONS)
    assert model.lm_head.layout.ranks == (0, 4)
    assert torch.equal(model.lm_head.weight, base.lm_head.weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("average", [False, True])
def test_streaming_gives_the_same_model(tmp_path, average):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    experts = {"math": with_vocabulary(base, 42), "chat": perturbed(base, seed=2)}
    folders = {name: in_folder(expert, tmp_path / name) for name, expert in experts.items()}
    options = {**OPTIONS, "average_experts": average}
    upscale_to_folder(tmp_path / "base", folders, tmp_path / "streamed", **options)
    expected = upscale(base, experts, **options)
    assert same(load(tmp_path / "streamed"), expected)
    save(expected, tmp_path / "saved")
    assert same(load(tmp_path / "saved"), expected)


def test_an_expert_of_another_size_is_added():
    base, expert = llama(), with_vocabulary(llama(), 42)
    model = add_expert(upscale(base, {"a": perturbed(base), "b": perturbed(base, seed=2)}, **OPTIONS), expert, "c")
    assert model.lm_head.layout.ranks == (4, 4, 0)


def test_an_adapter_with_added_tokens(tmp_path):
    base = llama()
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    resized = copy.deepcopy(base)
    resized.resize_token_embeddings(42, mean_resizing=False)
    peft = get_peft_model(resized, config)
    with torch.no_grad():
        for parameter in peft.parameters():
            parameter += 0.1 if parameter.requires_grad else 0.0
    peft.save_pretrained(tmp_path, save_embedding_layers=False)
    expert = cut(peft.merge_and_unload(), base)
    model = upscale(base, {"math": tmp_path, "chat": perturbed(base, seed=2)}, average_experts=True, **OPTIONS)
    expected = upscale(base, {"math": expert, "chat": perturbed(base, seed=2)}, average_experts=True, **OPTIONS)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.model.embed_tokens.weight, expected.model.embed_tokens.weight)


REFUSED: dict[str, tuple[dict, str]] = {
    "fewer heads of keys": ({"num_key_value_heads": 1}, "k_proj.weight has the shape (8, 16)"),
    "another width": ({"hidden_size": 32}, "embed_tokens.weight has the shape (40, 32)"),
    "another inner width": ({"intermediate_size": 32}, "gate_proj.weight has the shape (32, 16)"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_other_shapes_are_refused(options, message):
    with pytest.raises(PlanError) as error:
        upscale(llama(), {"other": llama(**options)}, **OPTIONS)
    assert message in str(error.value)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 6), st.integers(1, 6), st.integers(0, 3), st.sampled_from([torch.float32, torch.bfloat16]))
def test_resized_tensors(rows, pretrained_rows, columns, dtype):
    shape = (columns,) if columns else ()
    own, start = torch.randn(rows, *shape, dtype=dtype), torch.randn(pretrained_rows, *shape)
    source = ResizedSource(StateDictSource({"x": own}), StateDictSource({"x": start}), ["x"])
    result, shared = source.read("x"), min(rows, pretrained_rows)
    assert result.shape == source.shapes()["x"] == start.shape
    assert result.dtype == dtype
    assert torch.equal(result[:shared], own[:shared])
    assert torch.equal(result[shared:], start[shared:].to(dtype))
    assert not source.is_pretrained("x")
    kept = ResizedSource(StateDictSource({"x": own}), StateDictSource({"x": start}), ["x"], kept=["x"])
    assert torch.equal(kept.read("x"), start)
    assert kept.is_pretrained("x")
