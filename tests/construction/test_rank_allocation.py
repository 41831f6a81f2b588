"""Ranks within a budget of parameters."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from conftest import clip_inputs, clip_tower, experts_of, mlp, output, t5, tied_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fusion_bench_smile import ConfigError, PlanError, add_expert, load, metadata_of, save, upscale
from fusion_bench_smile.construction.rank_allocation import LayerSpectra, allocate, summarize_ranks
from fusion_bench_smile.nn import RoutedLayer, count_parameters

ALLOCATIONS = ("uniform", "energy", "gain")


@st.composite
def spectra(draw: st.DrawFn) -> list[LayerSpectra]:
    experts = draw(st.integers(1, 4))
    layers = []
    for number in range(draw(st.integers(1, 4))):
        energies = tuple(
            tuple(sorted(draw(st.lists(st.floats(1e-6, 10.0), max_size=6)), reverse=True)) for _ in range(experts)
        )
        gate_ranks = tuple(min(draw(st.integers(0, 3)), len(squares)) for squares in energies)
        layers.append(
            LayerSpectra(
                str(number), draw(st.integers(1, 20)), draw(st.integers(1, 20)), energies, gate_ranks,
                draw(st.booleans()), draw(st.floats(0.1, 10.0)), draw(st.integers(0, 9)), draw(st.integers(0, 1)),
            )
        )  # fmt: skip
    return layers


def cost(layers: list[LayerSpectra], ranks: list[list[int]]) -> int:
    """Counted as the layers store the factors, not direction by direction."""
    total = 0
    for layer, layer_ranks in zip(layers, ranks, strict=True):
        columns, rows = layer.in_features + layer.scales_per_row, layer.out_features + layer.scales_per_row
        total += layer.num_bias_parameters + sum(layer.gate_ranks) * columns
        for rank, gate_rank in zip(layer_ranks, layer.gate_ranks, strict=True):
            down_rank = rank - min(rank, gate_rank) if layer.shared_router else rank
            total += down_rank * columns + rank * rows
    return total


@given(layers=spectra(), budget=st.integers(0, 2000), allocation=st.sampled_from(ALLOCATIONS))
@settings(max_examples=150, deadline=None)
def test_a_budget_is_used_and_never_exceeded(layers: list[LayerSpectra], budget: int, allocation: str) -> None:
    if budget < sum(layer.min_parameters for layer in layers):
        with pytest.raises(ConfigError):
            allocate(layers, budget, allocation)
        return
    ranks = allocate(layers, budget, allocation)
    assert cost(layers, ranks) <= budget
    for index, (layer, layer_ranks) in enumerate(zip(layers, ranks, strict=True)):
        for expert, rank in enumerate(layer_ranks):
            assert layer.min_rank(expert) <= rank <= len(layer.energies[expert])
            if rank < len(layer.energies[expert]):  # no further direction fits into the budget
                larger = [list(other) for other in ranks]
                larger[index][expert] += 1
                assert cost(layers, larger) > budget


def test_energy_keeps_more_than_uniform_does() -> None:
    generator = torch.Generator().manual_seed(0)

    def energies(scale: float) -> tuple[float, ...]:
        return tuple((scale * torch.rand(8, generator=generator)).sort(descending=True).values.tolist())

    layers = [LayerSpectra(str(i), 10, 10, (energies(10.0**i), energies(1.0)), (0, 0), True, 10.0**i) for i in range(3)]

    def kept(allocation: str) -> float:
        ranks = allocate(layers, 200, allocation)
        pairs = zip(layers, ranks, strict=True)
        return sum(sum(e[:r]) for layer, layer_ranks in pairs for e, r in zip(layer.energies, layer_ranks, strict=True))

    exhaustive = max(
        sum(
            sum(e[:r])
            for layer, layer_ranks in zip(layers, choice, strict=True)
            for e, r in zip(layer.energies, layer_ranks, strict=True)
        )
        for choice in itertools.product(list(itertools.product(range(9), repeat=2)), repeat=3)
        if sum(map(sum, choice)) == 10
    )
    assert kept("energy") == pytest.approx(exhaustive)
    assert kept("energy") > kept("uniform")
    assert allocate(layers, 200, "gain") != allocate(layers, 200, "energy")


@pytest.mark.parametrize("make", [clip_tower, mlp, t5, tied_llama])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize(("ratio", "storage"), [(1.4, "same"), (1.7, "same"), (1.7, "int8")])
def test_the_recorded_parameters_are_those_of_the_model(
    make: Callable[[], nn.Module], allocation: str, ratio: float, storage: str
) -> None:
    base = make()
    model = upscale(base, experts_of(base), k=12, gate_k=1, param_ratio=ratio, allocation=allocation, storage=storage)
    before, after = count_parameters(base), count_parameters(model)
    assert after <= ratio * before
    assert metadata_of(model).provenance.parameters == (before, after)
    layers = [module for module in model.modules() if isinstance(module, RoutedLayer)]
    if any(max(layer.layout.ranks) < 12 for layer in layers):  # the budget was the limit
        largest_cost = max(layer.weight.shape[0] + layer.weight.shape[1] for layer in layers)
        assert after > ratio * before - 2 * largest_cost


def test_ranks_that_differ_are_stored_as_they_are(tmp_path) -> None:
    base = clip_tower()
    model = upscale(base, experts_of(base), k=12, gate_k=2, param_ratio=1.6, allocation="energy")
    layouts = [module.layout for module in model.modules() if isinstance(module, RoutedLayer)]
    assert len({rank for layout in layouts for rank in layout.ranks}) > 1
    for layer in (module for module in model.modules() if isinstance(module, RoutedLayer)):
        assert len(layer.up) == sum(layer.layout.ranks)
        assert len(layer.down) == sum(rank - 2 for rank in layer.layout.ranks)
    save(model, tmp_path / "model")
    inputs = clip_inputs()
    assert torch.equal(output(load(tmp_path / "model"), inputs), output(model, inputs))


def test_a_budget_gives_prefixes_of_the_full_ranks() -> None:
    base = mlp()
    experts = experts_of(base)
    full = upscale(base, experts, k=12, gate_k=2)
    fitted = upscale(base, experts, k=12, gate_k=2, param_ratio=1.9, allocation="energy")
    for name, layer in fitted.named_modules():
        if isinstance(layer, RoutedLayer):
            whole = full.get_submodule(name)
            for expert, rank in enumerate(layer.layout.ranks):
                assert torch.equal(layer.rows("up", expert), whole.rows("up", expert)[:rank])
                assert torch.equal(layer.directions(expert), whole.directions(expert)[:rank])
    energy = metadata_of(fitted).provenance.energy
    largest = metadata_of(full).provenance.energy
    assert all(a <= b + 1e-6 for name in energy for a, b in zip(energy[name], largest[name], strict=True))


def test_expert_parameters_and_noise_baseline_are_within_the_budget() -> None:
    base = clip_tower()
    options = {"routing_scope": "two_pass", "expert_parameters": "all", "noise_baseline": True}
    model = upscale(base, experts_of(base), k=12, gate_k=1, param_ratio=1.6, **options)
    assert count_parameters(model) <= 1.6 * count_parameters(base)
    assert metadata_of(model).provenance.parameters[1] == count_parameters(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"param_ratio": 1.01, "gate_k": 8}, "gate_k=8 needs .*lower gate_k"),
        ({"param_ratio": 1.0}, "above 1"),
        ({"param_ratio": float("nan")}, "above 1"),
        ({"param_ratio": "1.5"}, "above 1"),
        ({"param_ratio": 1.5, "k": -1}, "k=-1"),
        ({"param_ratio": 1.5, "gate_k": 16, "k": 8}, "above k=8"),
        ({"allocation": "best"}, "allocation='best'"),
        ({"storage": "int4"}, "storage='int4'"),
    ],
)
def test_budgets_that_cannot_work_are_refused(options: dict[str, object], message: str) -> None:
    base = clip_tower()
    with pytest.raises(ConfigError, match=message):
        upscale(base, experts_of(base), **{"k": 8, "gate_k": 2, **options})


def test_a_model_with_a_budget_is_not_extended() -> None:
    base = mlp()
    model = upscale(base, experts_of(base), k=8, gate_k=1, param_ratio=1.8)
    with pytest.raises(PlanError, match="param_ratio can't be changed"):
        add_expert(model, experts_of(base, 4)[-1], "more")


def test_the_summary_groups_layers_by_the_last_part_of_their_names():
    layers = [LayerSpectra(name, 4, 4, ((), ()), (0, 0), True, 1.0) for name in ("0.fc1", "1.fc1", "0.q_proj")]
    assert summarize_ranks(layers, [[1, 2], [3, 4], [5, 5]]) == {
        "fc1": "1 to 4, mean 2.5", "q_proj": "5 to 5, mean 5.0",
    }  # fmt: skip
