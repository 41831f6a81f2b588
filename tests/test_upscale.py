"""What an upscaled model is, in every case the options allow."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import ARCHITECTURES, experts_of, mlp, mlp_inputs, output, perturbed, t5, t5_inputs, tied_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fusion_bench_smile import ConfigError, PlanError, SmileConfig, SmileLinear, upscale
from fusion_bench_smile.factors import truncated_svd


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    true_rank=st.integers(0, 12),
    rank=st.integers(1, 15),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_truncated_svd_is_the_best_approximation(rows, columns, true_rank, rank, dtype):
    matrix = (torch.randn(rows, true_rank) @ torch.randn(true_rank, columns)).to(dtype)
    factors = truncated_svd(matrix, rank)
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close((factors.up @ factors.down).double(), best, rtol=tolerance, atol=tolerance)
    identity = torch.eye(factors.rank, dtype=torch.float64)
    torch.testing.assert_close((factors.down @ factors.down.T).double(), identity, rtol=0, atol=1e-4)
    assert factors.rank <= min(rank, rows, columns)


def test_numerical_rank_caps_the_factors():
    delta = torch.randn(30, 3) @ torch.randn(3, 20)
    assert truncated_svd(delta, 10).rank == 3
    assert truncated_svd(torch.zeros(4, 4), 2).rank == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("average", [False, True])
def test_inputs_are_untouched(architecture, average):
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


def test_full_rank_and_oracle_routing_is_the_expert():
    """One expert at full rank, with the averaged rest, is that expert."""
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


def test_an_expert_that_left_a_layer_alone_scores_zero_there():
    base = mlp()
    tuned = perturbed(base)
    upscaled = upscale(base, {"tuned": tuned, "same": copy.deepcopy(base)}, gate_k=2, k=4)
    layer = upscaled[0]
    assert layer.layout.ranks == (4, 0)
    assert layer.scores(torch.randn(5, 20))[:, 1].abs().max() == 0
    assert layer.chosen(layer.scores(torch.randn(50, 20)))[0].max() == 0


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


def test_average_experts_averages_the_rest():
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
    for average in (False, True):
        upscaled = upscale(base, experts, gate_k=2, k=4, average_experts=average)
        assert upscaled.lm_head.weight is upscaled.model.embed_tokens.weight
        assert torch.equal(upscaled.lm_head.weight, base.lm_head.weight)
        assert isinstance(upscaled.lm_head, SmileLinear)
    without = upscale(base, experts, gate_k=2, k=4, average_experts=True, exclude_modules=["lm_head"])
    mean = torch.stack([e.lm_head.weight for e in experts]).mean(0)
    torch.testing.assert_close(without.lm_head.weight, mean, check_stride=False)
    assert without.lm_head.weight is without.model.embed_tokens.weight


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
    exact = upscale(mlp_like(base), [mlp_like(e) for e in experts_of(base)], gate_k=2, k=4)
    error = (output(upscaled, {"input": x}).double() - output(exact, {"input": x.double()})).norm()
    assert error / output(exact, {"input": x.double()}).norm() < 20 * torch.finfo(dtype).eps


def mlp_like(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def test_modules_are_chosen_by_pattern():
    base = t5()
    experts = experts_of(base)
    only = upscale(base, experts, gate_k=2, k=4, target_modules=["*.SelfAttention.*"], exclude_modules=["decoder.*"])
    routed = [n for n, m in only.named_modules() if isinstance(m, SmileLinear)]
    assert len(routed) == 8
    assert all(n.startswith("encoder") and "SelfAttention" in n for n in routed)


def test_ranks_are_capped_by_the_layer(caplog):
    base = mlp()
    with caplog.at_level("INFO"):
        upscaled = upscale(base, experts_of(base), gate_k=14, k=16)
    assert upscaled[3].layout.ranks == (12, 12, 12)
    assert upscaled[3].layout.gate_ranks == (12, 12, 12)
    capped = [r.getMessage() for r in caplog.records if "capped" in r.getMessage()]
    assert capped == [
        "gate_k=14 is capped in 1 of 2 layers by their size, first in 3 (12)",
        "k=16 is capped in 1 of 2 layers by their size, first in 3 (12)",
    ]


def test_experts_may_be_loaded_one_at_a_time():
    base = mlp()
    experts = experts_of(base)
    alive: list[int] = []

    def loader(index: int):
        def load() -> nn.Module:
            alive.append(index)
            return experts[index]

        return load

    streamed = upscale(base, {str(i): loader(i) for i in range(3)}, gate_k=2, k=4)
    assert alive == [0, 1, 2]
    assert_same_state(streamed, state(upscale(base, experts, gate_k=2, k=4)))


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


BAD_OPTIONS = [
    ({"k": 0}, "k=0"),
    ({"k": -2}, "k=-2"),
    ({"gate_k": 0}, "gate_k=0"),
    ({"top_k": 0}, "top_k=0"),
    ({"top_k": 4}, "top_k=4 is more than the 3 experts"),
    ({"k": 21}, "k=21 is more than any layer allows; the largest possible is 20"),
    ({"gate_k": 99}, "gate_k=99 is more than any layer allows"),
    ({"k": 2.5}, "k=2.5 is not a whole number"),
    ({"gatek": 3}, "unknown option 'gatek' (did you mean 'gate_k'?)"),
    ({"device": "gpu"}, "device='gpu' is not a device"),
    ({"device": "cuda:77"}, "use device=auto"),
    ({"average_experts": "yes"}, "average_experts='yes' is not true or false"),
    ({"target_modules": ["nope.*"]}, "'nope.*' matches no linear layer"),
    ({"exclude_modules": ["*"]}, "leave none of the 2 linear layers"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[m for _, m in BAD_OPTIONS])
def test_bad_options_are_named(options, message):
    base = mlp()
    with pytest.raises((ConfigError, PlanError)) as error:
        upscale(base, experts_of(base), **{"gate_k": 2, "k": 4, **options})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def deeper() -> nn.Module:
    return nn.Sequential(*mlp(), nn.Linear(12, 4))


def wider() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 48), nn.LayerNorm(48), nn.GELU(), nn.Linear(48, 12, bias=False))


def without_bias() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 32, bias=False), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 12, bias=False))


def with_nan() -> nn.Module:
    model = mlp()
    model[3].weight.data[0, 0] = float("nan")
    return model


def with_infinity() -> nn.Module:
    model = mlp()
    model[1].bias.data[0] = float("inf")
    return model


BAD_EXPERTS = [
    (deeper, "expert 'bad' has another architecture than the pretrained model: 2 additional tensors (first: 4.weight)"),
    (without_bias, "1 tensors missing (first: 0.bias)"),
    (wider, "expert 'bad': 0.weight has the shape (48, 20), the pretrained model's (32, 20)"),
    (with_nan, "expert 'bad' holds NaN in 3.weight"),
    (with_infinity, "expert 'bad' holds infinity in 1.bias"),
]


@pytest.mark.parametrize(("make", "message"), BAD_EXPERTS, ids=[m.__name__ for m, _ in BAD_EXPERTS])
def test_mismatched_experts_are_named(make, message):
    base = mlp()
    with pytest.raises(PlanError) as error:
        upscale(base, {"good": perturbed(base), "bad": make()}, gate_k=2, k=4)
    assert message in str(error.value)


def test_no_experts():
    with pytest.raises(PlanError, match="no experts"):
        upscale(mlp(), [])


def test_nan_in_the_pretrained_model():
    with pytest.raises(PlanError, match=r"the pretrained model holds NaN in 3\.weight"):
        upscale(with_nan(), [mlp()], gate_k=2, k=4)


def test_layers_that_are_read_past_their_forward_are_refused():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.out = nn.Linear(8, 8)

    base = Attention()
    message = r"attention.out_proj .* exclude_modules=\['attention.out_proj'\]"
    with pytest.raises(PlanError, match=message):
        upscale(base, experts_of(base, 2), gate_k=2, k=2)
    fine = upscale(base, experts_of(base, 2), gate_k=2, k=2, exclude_modules=["attention.*"])
    assert isinstance(fine.out, SmileLinear)


def test_an_upscaled_model_is_no_pretrained_model():
    base = mlp()
    once = upscale(base, experts_of(base), gate_k=2, k=4)
    with pytest.raises(PlanError, match="0 is a SmileLinear"):
        upscale(once, [copy.deepcopy(once)], gate_k=2, k=4)


def test_config_round_trip():
    config = SmileConfig(k=-1, target_modules=["a.*"], exclude_modules="b")
    assert SmileConfig.from_dict(config.to_dict()) == config
    assert config.target_modules == ("a.*",)
    assert config.exclude_modules == ("b",)
