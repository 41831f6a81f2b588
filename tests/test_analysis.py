"""The studies against independent algebra in float64, and against the framework's own."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from conftest import clip_inputs, clip_tower, experts_of, mlp, mlp_inputs, output, perturbed
from fusion_bench.method.smile_upscaling.projected_energy import ProjectedEnergyAnalysis
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertModel

from fusion_bench_smile import upscale
from fusion_bench_smile.analysis import (
    Zones,
    coinciding_gates,
    confusion,
    error_accumulation,
    explained_variance,
    layer_accuracy,
    layer_load,
    projected,
    ranks_needed,
    recommend,
    routing_by_task,
    subspace_energy,
)
from fusion_bench_smile.analysis.cost import costs
from fusion_bench_smile.analysis.inputs import Call, blocks, caught
from fusion_bench_smile.analysis.routing import token_choices
from fusion_bench_smile.analysis.variance import added_parameters
from fusion_bench_smile.errors import SmileError
from fusion_bench_smile.layers import SmileLinear

SHAPES = [(12, 12), (20, 8), (8, 20), (1, 6), (7, 1)]


def weight_and_delta(shape: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), 0.1 * torch.randn(shape, generator=generator)


def dense_zones(weight: torch.Tensor, delta: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parts of a delta by the full SVD, in float64."""
    w, d = weight.double(), delta.double()
    u, s, vh = torch.linalg.svd(w, full_matrices=True)
    k = int((s.cumsum(0) < 0.5 * s.sum()).sum()) + 1
    r = len(s)

    def part(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return left @ left.T @ d @ right @ right.T

    return {
        "I": part(u[:, :k], vh[:k].T),
        "II": part(u[:, k:r], vh[k:r].T),
        "II+III": part(u[:, k:], vh[k:].T),
    }


@settings(deadline=None)
@given(st.tuples(st.integers(1, 24), st.integers(1, 24)), st.integers(0, 10))
def test_zones_are_those_of_the_full_svd(shape, seed):
    weight, delta = weight_and_delta(shape, seed)
    zones, total = Zones(weight.double()), delta.double().square().sum()
    for zone, expected in dense_zones(weight, delta).items():
        torch.testing.assert_close(zones.part(delta.double(), zone), expected, atol=1e-6, rtol=0)
        assert zones.shares(delta.double())[zone] == pytest.approx(float(expected.square().sum() / total), abs=1e-6)


class Analysis(ProjectedEnergyAnalysis):
    """The framework's, without a run."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")


@pytest.mark.parametrize("shape", SHAPES)
def test_shares_are_the_frameworks(shape):
    weight, delta = weight_and_delta(shape)
    theirs = Analysis().analyze_weight(weight, weight + delta)
    ours = Zones(weight).shares(delta)
    assert ours["I"] == pytest.approx(theirs["projected_energy_I"], abs=1e-5)
    assert ours["II"] == pytest.approx(theirs["projected_energy_II"], abs=1e-5)
    assert ours["II+III"] == pytest.approx(theirs["projected_energy_II_III"], abs=1e-5)


@pytest.mark.parametrize("shape", [(30, 30), (60, 20), (20, 60)])
def test_shares_of_random_matrices(shape):
    zones = Zones(weight_and_delta(shape)[0])
    draws = [zones.shares(weight_and_delta(shape, seed)[1]) for seed in range(1, 60)]
    for zone, expected in zones.of_random().items():
        assert np.mean([draw[zone] for draw in draws]) == pytest.approx(expected, rel=0.05)


def test_the_table_of_shares():
    base = clip_tower()
    experts = {"one": perturbed(base, seed=1), "same": copy.deepcopy(base)}
    table = subspace_energy(base, experts)
    layers = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    assert table["layer"].tolist() == [name for name in layers for _ in experts]
    assert set(table["type"]) == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    assert table[table["expert"] == "same"][["I", "II", "II+III"]].isna().all(axis=None)
    shares = table[table["expert"] == "one"][["I", "II", "II+III"]]
    assert ((shares >= 0) & (shares <= 1)).all(axis=None)
    assert (shares["II"] <= shares["II+III"] + 1e-6).all()


@pytest.mark.parametrize("zone", ["I", "II", "II+III"])
def test_a_projected_expert_has_one_zone_of_its_deltas(zone):
    base = clip_tower()
    expert = perturbed(base, seed=1)
    before = copy.deepcopy(expert.state_dict())
    found = projected(base, expert, zone)
    for name, module in found.named_modules():
        if isinstance(module, nn.Linear):
            start, end = base.get_submodule(name).weight.detach(), expert.get_submodule(name).weight.detach()
            expected = start.double() + dense_zones(start, end - start)[zone]
            torch.testing.assert_close(module.weight.double(), expected, atol=1e-4, rtol=0)
            assert torch.equal(module.bias, expert.get_submodule(name).bias)
    assert all(torch.equal(before[name], tensor) for name, tensor in expert.state_dict().items())


def test_explained_variance_is_that_of_the_singular_values():
    base = mlp()
    experts = dict(zip("ab", experts_of(base, 2), strict=True))
    table = explained_variance(base, experts)
    assert table.groupby(["layer", "expert"]).ngroups == 4
    for (layer, expert), rows in table.groupby(["layer", "expert"]):
        delta = experts[expert].get_submodule(layer).weight - base.get_submodule(layer).weight
        values = torch.linalg.svdvals(delta.detach().double()).numpy() ** 2
        np.testing.assert_allclose(rows["energy"], values, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(rows["explained"], values.cumsum() / values.sum(), rtol=1e-6)
        assert rows["rank"].tolist() == list(range(1, len(values) + 1))
    needed = ranks_needed(table)
    assert (needed["90 %"] <= needed["95 %"]).all()
    assert (needed["95 %"] <= needed["99 %"]).all()
    first = needed.iloc[0]
    rows = table[(table["layer"] == first["layer"]) & (table["expert"] == first["expert"])].set_index("rank")
    assert rows.loc[first["95 %"], "explained"] >= 0.95
    assert rows.loc[first["95 %"] - 1, "explained"] < 0.95


def low_rank_experts(base: nn.Module, rank: int) -> dict[str, nn.Module]:
    experts = {}
    for seed in range(3):
        expert = copy.deepcopy(base)
        generator = torch.Generator().manual_seed(seed)
        for module in expert.modules():
            if isinstance(module, nn.Linear):
                out, columns = module.weight.shape
                b, a = torch.randn(out, rank, generator=generator), torch.randn(rank, columns, generator=generator)
                module.weight.data += 0.01 * b @ a
        experts[f"expert{seed}"] = expert
    return experts


@pytest.mark.parametrize("k", [2, 4])
def test_the_predicted_ratio_is_the_built_models(k):
    base = clip_tower()
    experts = low_rank_experts(base, 4)
    built = upscale(base, experts, k=k, gate_k=k)
    before = sum(p.numel() for p in base.parameters())
    predicted = added_parameters(explained_variance(base, experts), k)
    assert predicted == sum(p.numel() for p in built.parameters()) - before


def test_the_recommendation_keeps_what_it_says():
    base = clip_tower()
    variance = explained_variance(base, low_rank_experts(base, 4))
    everything = recommend(variance, 10**6, target=0.999999)
    assert everything.k == everything.gate_k == 4
    assert everything.kept == pytest.approx(1, abs=1e-6)
    some = recommend(variance, 10**6, target=0.5)
    kept = variance[variance["rank"] <= some.k]["energy"].sum() / variance["energy"].sum()
    assert kept >= 0.5
    assert some.kept == pytest.approx(kept)
    assert some.ratio == 1 + added_parameters(variance, some.k) / 10**6


def test_inputs_are_caught_and_the_evaluation_ends_there():
    model, seen = mlp(), []

    def evaluate(given: nn.Module) -> None:
        for number in range(100):
            seen.append(number)
            given(torch.full((2, 20), float(number)))

    calls = caught(model, evaluate, 3)
    assert [float(call.args[0][0, 0]) for call in calls] == [0, 1, 2]
    assert len(seen) == 3
    assert torch.equal(calls[1](model), model(torch.ones(2, 20)))
    assert not model._forward_pre_hooks
    with pytest.raises(SmileError, match="didn't call the model"):
        caught(model, lambda _: None, 1)
    with pytest.raises(ZeroDivisionError):
        caught(model, lambda _: 1 / 0, 1)
    assert not model._forward_pre_hooks


def calls_of(count: int = 2) -> list[Call]:
    return [Call((), clip_inputs()) for _ in range(count)]


@pytest.mark.parametrize("top_k", [1, 2])
def test_routing_by_task_is_what_the_layers_choose(top_k):
    base = clip_tower()
    names = ("a", "b", "c")
    model = upscale(base, dict(zip(names, experts_of(base), strict=True)), k=4, gate_k=4, top_k=top_k)
    calls = {"a": calls_of(), "elsewhere": calls_of(1)}
    table = routing_by_task(model, calls, names)
    layer = next(name for name, m in model.named_modules() if isinstance(m, SmileLinear))
    scores = []
    handle = model.get_submodule(layer).register_forward_pre_hook(
        lambda module, args: scores.append(module.scores(args[0]).flatten(0, -2))
    )
    for call in calls["a"]:
        call(model)
    handle.remove()
    found = torch.cat(scores).double()
    kept, chosen = found.topk(top_k)
    expected = torch.zeros(3, dtype=torch.float64).index_add_(0, chosen.flatten(), kept.softmax(-1).flatten())
    rows = table[(table["layer"] == layer) & (table["task"] == "a")]
    assert rows["expert"].tolist() == list(names)
    np.testing.assert_allclose(rows["share"], (expected / expected.sum()).numpy(), atol=1e-5)
    shares = found.softmax(-1)
    entropy = -(shares * shares.log()).sum(-1).mean() / np.log(3)
    np.testing.assert_allclose(rows["entropy"], float(entropy), atol=1e-5)
    matrix = confusion(table)
    assert matrix.index.tolist() == ["a", "elsewhere"]
    assert matrix.columns.tolist() == list(names)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(layer_load(table).sum(axis=1), 1, atol=1e-6)
    assert layer_accuracy(table)[layer] == pytest.approx(rows["share"].iloc[0])


def test_a_router_that_sees_the_task_is_always_right():
    """Expert a reacts to the first input features alone, expert b to the last ones."""
    base = nn.Sequential(nn.Linear(20, 8)).eval()
    experts, inputs = {}, {}
    for name, columns in (("a", slice(0, 4)), ("b", slice(16, 20))):
        experts[name] = copy.deepcopy(base)
        x = torch.zeros(5, 20)
        x[:, columns] = torch.randn(5, 4)
        inputs[name] = [Call((x,), {})]
        with torch.no_grad():
            experts[name][0].weight[:, columns] += torch.randn(8, 4)
    table = routing_by_task(upscale(base, experts, k=4, gate_k=4), inputs, ("a", "b"))
    np.testing.assert_allclose(confusion(table), np.eye(2))
    assert layer_accuracy(table).tolist() == [1.0]


@pytest.mark.parametrize("execution", ["grouped", "masked"])
def test_padding_does_not_count(execution):
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    base = BertModel(config, add_pooling_layer=False).eval()
    names = ("0", "1", "2")
    model = upscale(base, experts_of(base), k=4, gate_k=4, execution=execution).eval()
    ids = torch.randint(5, 50, (3, 6))
    short = Call((), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    padded = Call((), {name: nn.functional.pad(value, (0, 9)) for name, value in short.kwargs.items()})
    plain, with_padding = (routing_by_task(model, {"0": [call]}, names) for call in (short, padded))
    np.testing.assert_allclose(plain["share"], with_padding["share"], atol=1e-6)
    np.testing.assert_allclose(plain["entropy"], with_padding["entropy"], atol=1e-5)
    error, error_padded = (error_accumulation(base, {"it": model}, [call]) for call in (short, padded))
    assert len(error) == 2
    np.testing.assert_allclose(error["error"], error_padded["error"], rtol=1e-4)


def test_gates_that_coincide_are_named(caplog):
    base = mlp()
    expert, other = experts_of(base, 2)
    larger = copy.deepcopy(base)
    with torch.no_grad():
        for mine, start, end in zip(larger.parameters(), base.parameters(), expert.parameters(), strict=True):
            mine.copy_(start + 2 * (end - start))  # the same task vector, twice as large
    model = upscale(base, {"one": expert, "other": other, "double": larger}, k=2, gate_k=2)
    with caplog.at_level(logging.WARNING):
        table = coinciding_gates(model, ("one", "other", "double"))
    same = table[(table["first"] == "one") & (table["second"] == "double")]
    assert len(same) == 2
    assert (same["cosine"] > 0.999).all()
    assert (table.drop(same.index)["cosine"] < 0.9).all()
    assert [r.message for r in caplog.records if "one and double nearly coincide" in r.message] == [
        r.message for r in caplog.records
    ]
    assert len(caplog.records) == len(same)


def test_the_choice_of_every_token():
    base = clip_tower()
    model = upscale(base, experts_of(base), k=4, gate_k=4)
    layer = next(name for name, m in model.named_modules() if isinstance(m, SmileLinear))
    choices = token_choices(model, calls_of(1)[0], layer)
    assert choices.shape[0] == 6
    assert choices.ndim == 2
    assert set(choices.unique().tolist()) <= {0, 1, 2}


def test_blocks_follow_each_other():
    tower = clip_tower()
    assert list(blocks(tower)) == [f"vision_model.encoder.layers.{n}" for n in range(tower.config.num_hidden_layers)]
    assert blocks(mlp()) == {}
    assert Call((), mlp_inputs()).mask is None


def test_errors_grow_by_what_is_cut_off():
    base = clip_tower()
    expert = perturbed(base, seed=1)
    calls = calls_of()
    models = {"itself": expert, **{f"rank {k}": upscale(base, [expert], k=k).eval() for k in (1, 8)}}
    table = error_accumulation(expert, models, calls)
    pivot = table.pivot(index="block", columns="model", values="error")
    assert (pivot["itself"] == 0).all()
    assert (pivot["rank 8"] < pivot["rank 1"]).all()
    last = list(blocks(expert))[-1]
    states = {}
    for name, model in (("own", expert), ("other", models["rank 1"])):
        parts: list[torch.Tensor] = []
        handle = model.get_submodule(last).register_forward_hook(
            lambda _, __, out, parts=parts: parts.append(out[0] if isinstance(out, tuple) else out)
        )
        for call in calls:
            output(model, dict(call.kwargs))
        handle.remove()
        states[name] = torch.cat(parts).double()
    expected = (states["other"] - states["own"]).norm() / states["own"].norm()
    assert pivot["rank 1"].iloc[-1] == pytest.approx(float(expected), rel=1e-6)


def test_costs_are_those_of_the_models_built():
    base = mlp()
    experts = dict(zip("abc", experts_of(base), strict=True))
    call = Call((), mlp_inputs())
    table = costs(base, experts, [(3, 4, 4), (1, 4, 4), (3, 2, 2)], call, repeats=2).set_index(
        ["experts", "gate_k", "k"]
    )
    plain = sum(p.numel() for p in base.parameters())
    for (count, gate_k, k), row in table.iterrows():
        built = upscale(base, dict(list(experts.items())[:count]), gate_k=gate_k, k=k)
        assert row["parameters"] == sum(p.numel() for p in built.parameters()) / plain
        assert row["construction"] > 0
        assert row["forward"] > 0
    assert table.loc[(3, 4, 4), "flops"] > table.loc[(3, 2, 2), "flops"] > 1
    # one expert of rank 4: (20 + 32)·4 and (32 + 12)·4 multiply-adds, and 32 for a bias, beside 20·32 and 32·12
    assert table.loc[(1, 4, 4), "flops"] == pytest.approx(1 + (52 * 4 + 44 * 4 + 32) / (640 + 384))
