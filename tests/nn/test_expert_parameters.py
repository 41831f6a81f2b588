"""Norms and embeddings of the experts."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import clip_inputs, clip_tower, experts_of, output, perturbed, t5, tied_llama
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GemmaConfig, GemmaForCausalLM

from fusion_bench_smile import as_expert, choose_experts, load, metadata_of, save, upscale, use_experts
from fusion_bench_smile.nn import count_parameters
from fusion_bench_smile.nn.expert_parameters import (
    detach_expert_parameters,
    expert_parameter_names,
    is_norm,
    modules_with_expert_parameters,
)


@pytest.mark.parametrize("make", [clip_tower, t5, tied_llama])
@pytest.mark.parametrize("execution", ["grouped", "masked"])
def test_all_parameters_of_an_expert_are_lossless(make, execution: str, tmp_path: Path) -> None:
    """With full rank, and the expert's norms and embeddings, the model of an expert is the fine-tuned one."""
    base = make()
    experts = [perturbed(base, 0.05, seed) for seed in (1, 2)]
    for expert in experts:  # these cannot differ between experts: bare parameters, convolutions, relative positions
        for name, parameter in expert.named_parameters():
            if name.endswith(("class_embedding", "patch_embedding.weight", "relative_attention_bias.weight")):
                parameter.data.copy_(base.get_parameter(name))
    options = {"k": 64, "gate_k": 2, "routing_scope": "two_pass", "expert_parameters": "all"}
    if make is tied_llama:
        options["exclude_modules"] = ["lm_head"]
        for expert in experts:
            expert.model.embed_tokens.weight.data.copy_(base.model.embed_tokens.weight)
    largest = {clip_tower: 32, t5: 32, tied_llama: 16}[make]
    model = upscale(base, experts, execution=execution, **{**options, "k": largest})
    assert metadata_of(model).provenance.parameters[1] == count_parameters(model)
    inputs = clip_inputs() if make is clip_tower else {"input_ids": torch.randint(1, 40, (4, 6))}
    if make is t5:
        inputs["decoder_input_ids"] = torch.randint(1, 40, (4, 3))
    for number, expert in enumerate(experts):
        with as_expert(model, str(number)):
            torch.testing.assert_close(output(model, inputs), output(expert, inputs), atol=2e-4, rtol=2e-4)
    routed = output(model, inputs)
    outputs = [output(expert, inputs) for expert in experts]
    encoder_inputs = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    choice = choose_experts(model, **encoder_inputs).argmax(-1).tolist()
    for row, expert in enumerate(choice):  # of a batch with several experts
        torch.testing.assert_close(routed[row], outputs[expert][row], atol=2e-4, rtol=2e-4)
    save(model, tmp_path / "model")
    assert torch.equal(output(load(tmp_path / "model").eval(), inputs), routed)


def gemma() -> nn.Module:
    config = GemmaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GemmaForCausalLM(config).eval()


def gemma2() -> nn.Module:
    config = Gemma2Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


@pytest.mark.parametrize("make", [gemma, gemma2])
def test_norms_that_scale_by_one_plus_the_weight(make) -> None:
    """The norms of Gemma compute x̂·(1 + weight)."""
    base = make()
    experts = [perturbed(base, 0.1, seed) for seed in (1, 2)]
    for expert in experts:
        expert.model.embed_tokens.weight.data.copy_(base.model.embed_tokens.weight)
    options = {"k": 16, "gate_k": 2, "routing_scope": "two_pass", "exclude_modules": ["lm_head"]}
    model = upscale(base, experts, expert_parameters="norms", **options)
    norms = [name for name, module in base.named_modules() if type(module).__name__.endswith("RMSNorm")]
    assert list(modules_with_expert_parameters(model)) == norms
    inputs = {"input_ids": torch.randint(3, 40, (4, 6))}
    outputs = [output(expert, inputs) for expert in experts]
    for number, expected in enumerate(outputs):
        with as_expert(model, str(number)):
            torch.testing.assert_close(output(model, inputs), expected, atol=2e-4, rtol=2e-4)
    with use_experts(model, torch.eye(2)[[0, 1, 1, 0]]):
        routed = output(model, inputs)
    for row, expert in enumerate([0, 1, 1, 0]):
        torch.testing.assert_close(routed[row], outputs[expert][row], atol=2e-4, rtol=2e-4)
    pretrained_norms = upscale(base, experts, **options)
    with as_expert(pretrained_norms, "0"):  # the norms matter
        assert (output(pretrained_norms, inputs) - outputs[0]).abs().max() > 1e-2


def test_norms_alone_or_with_embeddings() -> None:
    base = t5()
    options = {"k": 8, "gate_k": 2, "routing_scope": "two_pass"}
    modules = {
        selected: modules_with_expert_parameters(upscale(base, experts_of(base), expert_parameters=selected, **options))
        for selected in ("layers", "norms", "all")
    }
    assert not modules["layers"]
    assert modules["norms"]
    assert all("norm" in name for name in modules["norms"])
    assert set(modules["all"]) - set(modules["norms"])
    assert set(modules["norms"]) < set(modules["all"])
    for selected, names in modules.items():
        parameters = {f"{module}.{name}" for module in names for name in names[module]}
        assert parameters <= set(expert_parameter_names(base, selected))


def test_norm_types() -> None:
    from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    for norm in (nn.LayerNorm(8), nn.LayerNorm(8, bias=False), nn.RMSNorm(8), T5LayerNorm(8), GemmaRMSNorm(8)):
        nn.init.normal_(norm.weight)
        assert is_norm(norm)
    assert is_norm(ConvNextLayerNorm(8, data_format="channels_last"))
    others = (
        nn.BatchNorm1d(8),
        nn.GroupNorm(2, 8),
        nn.Linear(8, 8),
        nn.PReLU(8),
        nn.LayerNorm(8, elementwise_affine=False),
        nn.LayerNorm((4, 8)),
        ConvNextLayerNorm(8, data_format="channels_first"),
    )
    assert not any(is_norm(other.eval()) for other in others)


def test_detached_parameters_are_not_used() -> None:
    base = clip_tower()
    options = {"k": 8, "gate_k": 2, "routing_scope": "two_pass"}
    model = upscale(base, experts_of(base), expert_parameters="all", **options)
    inputs = clip_inputs()
    expected = output(upscale(base, experts_of(base), **options), inputs)
    assert not torch.equal(output(model, inputs), expected)
    detach_expert_parameters(model)
    assert not modules_with_expert_parameters(model)
    assert torch.equal(output(model, inputs), expected)


def test_the_given_models_are_not_modified() -> None:
    base = clip_tower()
    experts = experts_of(base)
    before = [copy.deepcopy(model.state_dict()) for model in (base, *experts)]
    model = upscale(base, experts, k=8, gate_k=2, routing_scope="two_pass", expert_parameters="all")
    output(model, clip_inputs())
    for model, state in zip((base, *experts), before, strict=True):
        assert not any(module._forward_hooks for module in model.modules())
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
