"""Upscaled models, in every case that the options allow."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import ARCHITECTURES, experts_of, mlp, mlp_inputs, output, perturbed, t5, t5_inputs, tied_llama
from torch import nn

from fusion_bench_smile import ConfigError, SmileConfig, SmileLinear, upscale
from fusion_bench_smile.nn import router_scores, select_experts


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("average", [False, True])
def test_the_given_models_are_not_modified(architecture, average):
    base = ARCHITECTURES[architecture][0]()
    experts = experts_of(base)
    before = [state(m) for m in (base, *experts)]
    modules = [dict(m.named_modules()) for m in (base, *experts)]
    upscaled = upscale(base, experts, gate_k=2, k=3, average_experts=average)
    with torch.no_grad():
        for parameter in upscaled.parameters():
            parameter.add_(1)
    for model, kept, names in zip((base, *experts), before, modules, strict=True):
        assert_same_state(model, kept)
        assert dict(model.named_modules()) == names


def test_in_place_builds_in_the_pretrained_model_itself():
    base = mlp()
    expected = upscale(base, experts_of(base), gate_k=2, k=4)
    with pytest.raises(ConfigError):
        upscale(base, experts_of(base), gate_k=2, k=99, in_place=True)
    assert not any(isinstance(module, SmileLinear) for module in base.modules())
    built = upscale(base, experts_of(base), gate_k=2, k=4, in_place=True)
    assert built is base
    assert_same_state(built, state(expected))


def test_one_expert_of_full_rank_is_the_expert():
    """With the other parameters averaged over it."""
    base = mlp().double()
    expert = perturbed(base)
    for k in (20, -1):
        upscaled = upscale(base, [expert], gate_k=1, k=k, average_experts=True)
        x = {"input": mlp_inputs()["input"].double()}
        torch.testing.assert_close(output(upscaled, x), output(expert, x), rtol=1e-10, atol=1e-10)


def test_identical_experts_are_one_expert():
    base = mlp().double()
    expert = perturbed(base)
    x = {"input": mlp_inputs()["input"].double()}
    alone = output(upscale(base, [expert], gate_k=4, k=6), x)
    for top_k in (1, 2, 3):
        together = upscale(base, [copy.deepcopy(expert) for _ in range(3)], gate_k=4, k=6, top_k=top_k)
        torch.testing.assert_close(output(together, x), alone, rtol=1e-10, atol=1e-10)


def test_experts_equal_to_the_pretrained_model_change_nothing():
    base = mlp()
    upscaled = upscale(base, [copy.deepcopy(base), copy.deepcopy(base)], gate_k=2, k=2)
    assert not any(isinstance(m, SmileLinear) for m in upscaled.modules())
    assert torch.equal(output(upscaled, (x := mlp_inputs())), output(base, x))


def test_an_expert_that_did_not_change_a_layer_scores_zero_in_it():
    base = mlp()
    tuned = perturbed(base)
    upscaled = upscale(base, {"tuned": tuned, "same": copy.deepcopy(base)}, gate_k=2, k=4)
    layer = upscaled[0]
    assert layer.layout.ranks == (4, 0)
    assert router_scores(layer, torch.randn(5, 20))[:, 1].abs().max() == 0
    assert select_experts(router_scores(layer, torch.randn(50, 20)), 1)[0].max() == 0


def test_bias_changes_belong_to_the_expert_also_without_a_weight_change():
    base = mlp().double()
    one, two = copy.deepcopy(base), perturbed(base)
    with torch.no_grad():
        one[0].bias += 1.0
    x = {"input": mlp_inputs()["input"].double()}
    torch.testing.assert_close(output(upscale(base, [one], k=4, gate_k=2), x), output(one, x), rtol=1e-12, atol=1e-12)
    both = upscale(base, [one, two], gate_k=2, k=4)
    assert both[0].layout.ranks == (0, 4)
    torch.testing.assert_close(both[0].expert_bias[0], torch.ones(32, dtype=torch.float64))


@pytest.mark.parametrize("options", [{}, {"routing_use_diff": False}, {"storage": "int4", "routing_scope": "input"}])
@pytest.mark.parametrize("k", [4, 16])  # the second layer has 12 outputs
def test_without_a_rank_of_the_router_it_is_that_of_the_experts(k, options):
    base, inputs = mlp(), mlp_inputs()
    model, expected = (upscale(base, experts_of(base), gate_k=gate_k, k=k, **options) for gate_k in (None, k))
    assert_same_state(model, state(expected))
    assert torch.equal(output(model, inputs), output(expected, inputs))
    if options.get("routing_use_diff", True):
        assert all(layer.down is None for layer in (model[0], model[3]))  # the router shares all directions


def test_average_experts_averages_the_other_parameters():
    base = t5()
    experts = experts_of(base)
    upscaled = upscale(base, experts, gate_k=2, k=4, average_experts=True)
    names = [n for n in base.state_dict() if "norm" in n or "shared" in n or "relative" in n]
    assert names
    for name in names:
        mean = torch.stack([e.state_dict()[name] for e in experts]).mean(0)
        torch.testing.assert_close(upscaled.state_dict()[name], mean)
    plain = upscale(base, experts, gate_k=2, k=4)
    assert all(torch.equal(plain.state_dict()[name], base.state_dict()[name]) for name in names)


def test_tied_weights_stay_tied():
    base = tied_llama()
    experts = experts_of(base, 2)
    upscaled = upscale(base, experts, gate_k=2, k=4)
    assert upscaled.lm_head.weight is upscaled.model.embed_tokens.weight
    assert torch.equal(upscaled.lm_head.weight, base.lm_head.weight)
    assert isinstance(upscaled.lm_head, SmileLinear)
    without = upscale(base, experts, gate_k=2, k=4, average_experts=True, exclude_modules=["lm_head"])
    mean = torch.stack([e.lm_head.weight for e in experts]).mean(0)
    torch.testing.assert_close(without.lm_head.weight, mean, check_stride=False)
    assert without.lm_head.weight is without.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("make", "experts", "scope", "warns"),
    [
        (tied_llama, 2, "token", True),
        (tied_llama, 1, "token", False),
        (tied_llama, 2, "input", False),
        (t5, 2, "token", False),
    ],
)
def test_token_routing_of_a_causal_language_model_is_warned_of(make, experts, scope, warns, caplog):
    base = make()
    upscale(base, experts_of(base, experts), gate_k=2, k=4, routing_scope=scope)
    assert ("routing_scope=input with top_k=2 chooses by the whole prompt" in caplog.text) == warns


def test_a_layer_used_twice_is_upscaled_once():
    shared = nn.Linear(8, 8)
    base = nn.Sequential(shared, nn.ReLU(), shared)
    upscaled = upscale(base, experts_of(base, 2), gate_k=2, k=2)
    assert upscaled[0] is upscaled[2]
    assert isinstance(upscaled[0], SmileLinear)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    base = mlp().to(dtype)
    upscaled = upscale(base, experts_of(base), gate_k=2, k=4)
    assert {p.dtype for p in upscaled.parameters()} == {dtype}
    x = mlp_inputs()["input"].to(dtype)
    exact = upscale(in_float64(base), [in_float64(e) for e in experts_of(base)], gate_k=2, k=4)
    error = (output(upscaled, {"input": x}).double() - output(exact, {"input": x.double()})).norm()
    assert error / output(exact, {"input": x.double()}).norm() < 20 * torch.finfo(dtype).eps


def in_float64(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def test_a_config_and_keywords_give_the_same_model():
    base = mlp()
    by_keywords = upscale(base, experts_of(base), gate_k=2, k=4)
    assert_same_state(upscale(base, experts_of(base), SmileConfig(gate_k=2, k=4)), state(by_keywords))
    with pytest.raises(ConfigError, match=r"either config or keywords, not both \(got k\)"):
        upscale(base, experts_of(base), SmileConfig(), k=4)


def test_training_reaches_the_experts():
    base = mlp()
    upscaled = upscale(base, experts_of(base), gate_k=2, k=4, top_k=2)
    upscaled(mlp_inputs()["input"]).square().mean().backward()
    for name, parameter in upscaled.named_parameters():
        assert parameter.grad is not None, name


def test_generation_with_a_cache_equals_generation_without():
    base = t5()
    upscaled = upscale(base, experts_of(base, scale=0.3), gate_k=2, k=4, top_k=2)
    prompt = t5_inputs()["input_ids"]
    tokens = [
        upscaled.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=cache, eos_token_id=None)
        for cache in (True, False)
    ]
    assert torch.equal(*tokens)
