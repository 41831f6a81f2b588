"""Ranks within a budget of parameters or bytes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence

import pytest
import torch
from conftest import clip_inputs, clip_tower, experts_of, gpt2, mlp, output, t5, tied_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fusion_bench_smile import ConfigError, PlanError, add_expert, load, metadata_of, save, upscale
from fusion_bench_smile.construction.rank_allocation import LayerSpectra, allocate, summarize_ranks
from fusion_bench_smile.nn import RoutedLayer, count_bytes, count_parameters, row_size


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
                str(number), energies, gate_ranks, draw(st.booleans()),
                up_cost=draw(st.integers(1, 20)), down_cost=draw(st.integers(1, 20)), bias_cost=draw(st.integers(0, 9)),
            )
        )  # fmt: skip
    return layers


def cost(layers: list[LayerSpectra], ranks: list[list[int]]) -> int:
    """Counted as the layers store the factors, not direction by direction."""
    total = 0
    for layer, layer_ranks in zip(layers, ranks, strict=True):
        total += layer.bias_cost + sum(layer.gate_ranks) * layer.down_cost
        for rank, gate_rank in zip(layer_ranks, layer.gate_ranks, strict=True):
            down_rank = rank - min(rank, gate_rank) if layer.shared_router else rank
            total += down_rank * layer.down_cost + rank * layer.up_cost
    return total


@given(layers=spectra(), budget=st.integers(0, 2000))
@settings(max_examples=150, deadline=None)
def test_a_budget_is_used_and_never_exceeded(layers: list[LayerSpectra], budget: int) -> None:
    least = sum(layer.min_cost for layer in layers)
    assert least == cost(layers, [[layer.min_rank(e) for e in range(len(layer.energies))] for layer in layers])
    if budget < least:
        with pytest.raises(ConfigError, match=f"{least - budget:,} too many"):
            allocate(layers, budget)
        return
    ranks = allocate(layers, budget)
    assert cost(layers, ranks) <= budget
    for index, (layer, layer_ranks) in enumerate(zip(layers, ranks, strict=True)):
        for expert, rank in enumerate(layer_ranks):
            assert layer.min_rank(expert) <= rank <= len(layer.energies[expert])
            if rank < len(layer.energies[expert]):  # no further direction fits into the budget
                larger = [list(other) for other in ranks]
                larger[index][expert] += 1
                assert cost(layers, larger) > budget


def test_the_ranks_keep_the_most_energy_of_all_with_their_cost() -> None:
    generator = torch.Generator().manual_seed(0)

    def energies(scale: float) -> tuple[float, ...]:
        return tuple((scale * torch.rand(8, generator=generator)).sort(descending=True).values.tolist())

    layers = [LayerSpectra(str(i), (energies(10.0**i), energies(1.0)), (0, 0), True, 10, 10) for i in range(3)]

    def kept(ranks: Sequence[Sequence[int]]) -> float:
        pairs = zip(layers, ranks, strict=True)
        return sum(sum(e[:r]) for layer, layer_ranks in pairs for e, r in zip(layer.energies, layer_ranks, strict=True))

    choices = itertools.product(list(itertools.product(range(9), repeat=2)), repeat=3)
    assert kept(allocate(layers, 200)) == pytest.approx(max(kept(c) for c in choices if sum(map(sum, c)) == 10))


def test_a_cheaper_direction_comes_before_one_with_little_more_energy() -> None:
    layers = [
        LayerSpectra("wide", ((3.0, 1.5),), (0,), True, up_cost=20, down_cost=10),
        LayerSpectra("narrow", ((2.0, 1.0, 0.4),), (0,), True, up_cost=5, down_cost=5),
    ]
    assert allocate(layers, 20) == [[0], [2]]
    assert allocate(layers, 50) == [[1], [2]]
    assert allocate(layers, 59) == [[1], [2]]
    assert allocate(layers, 60) == [[1], [3]]


BUDGETS = [
    ("param_ratio", 1.4, "same"), ("param_ratio", 1.7, "same"), ("param_ratio", 1.7, "int8"),
    ("param_ratio", 1.7, "int4"), ("byte_ratio", 1.5, "same"), ("byte_ratio", 1.25, "int8"),
    ("byte_ratio", 1.15, "int4"),
]  # fmt: skip


@pytest.mark.parametrize("make", [clip_tower, mlp, t5, tied_llama, gpt2])
@pytest.mark.parametrize(("budget", "ratio", "storage"), BUDGETS)
@pytest.mark.parametrize("shared_router", [True, False])
def test_a_budget_is_that_of_the_model(
    make: Callable[[], nn.Module], budget: str, ratio: float, storage: str, shared_router: bool
) -> None:
    base, options = make(), {"storage": storage, "routing_use_diff": shared_router}
    model = upscale(base, experts_of(base), k=12, gate_k=1, **{budget: ratio}, **options)
    assert metadata_of(model).provenance.parameters == (count_parameters(base), count_parameters(model))
    in_bytes = budget == "byte_ratio"
    count = count_bytes if in_bytes else count_parameters
    assert count(model) <= ratio * count(base)
    layers = [module for module in model.modules() if isinstance(module, RoutedLayer)]
    if any(max(layer.layout.ranks) < 12 for layer in layers):  # the budget was the limit
        sizes = [[row_size(n, storage, torch.float32, in_bytes) for n in layer.weight.shape] for layer in layers]
        largest = max(map(sum, sizes))
        assert count(model) > ratio * count(base) - 2 * largest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("storage", ["same", "int8", "int4"])
def test_bytes_are_those_of_the_models_dtype(dtype: torch.dtype, storage: str) -> None:
    base = clip_tower().to(dtype)
    model = upscale(base, experts_of(base), k=12, gate_k=1, byte_ratio=1.5, storage=storage)
    assert 1.47 * count_bytes(base) < count_bytes(model) <= 1.5 * count_bytes(base)


def test_ranks_that_differ_are_stored_as_they_are(tmp_path) -> None:
    base = clip_tower()
    model = upscale(base, experts_of(base), k=12, gate_k=2, param_ratio=1.6)
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
    fitted = upscale(base, experts, k=12, gate_k=2, param_ratio=1.9)
    for name, layer in fitted.named_modules():
        if isinstance(layer, RoutedLayer):
            whole = full.get_submodule(name)
            for expert, rank in enumerate(layer.layout.ranks):
                assert torch.equal(layer.rows("up", expert), whole.rows("up", expert)[:rank])
                assert torch.equal(layer.directions(expert), whole.directions(expert)[:rank])
    energy = metadata_of(fitted).provenance.energy
    largest = metadata_of(full).provenance.energy
    assert all(a <= b + 1e-6 for name in energy for a, b in zip(energy[name], largest[name], strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"param_ratio": 1.01, "gate_k": 8}, "gate_k=8 needs .*lower gate_k"),
        ({"param_ratio": 1.0}, "above 1"),
        ({"param_ratio": float("nan")}, "above 1"),
        ({"param_ratio": "1.5"}, "above 1"),
        ({"param_ratio": 1.5, "k": -1}, "k=-1"),
        ({"param_ratio": 1.5, "gate_k": 16, "k": 8}, "above k=8"),
        ({"param_ratio": 1.5, "gate_k": None}, "param_ratio needs a gate_k"),
        ({"byte_ratio": 1.01, "gate_k": 8}, r"byte_ratio=1\.01 is too little for the router rows .* bytes: gate_k=8"),
        ({"byte_ratio": 0.9}, r"byte_ratio=0\.9 is not a number above 1"),
        ({"byte_ratio": 1.5, "k": -1}, "byte_ratio allocates ranks up to k"),
        ({"byte_ratio": 1.5, "gate_k": None}, "byte_ratio needs a gate_k"),
        ({"byte_ratio": 1.5, "param_ratio": 1.5}, "param_ratio and byte_ratio are two budgets of one model"),
        ({"storage": "int2"}, "storage='int2' is not one of same, int8, int4"),
    ],
)
def test_budgets_that_cannot_work_are_refused(options: dict[str, object], message: str) -> None:
    base = clip_tower()
    with pytest.raises(ConfigError, match=message):
        upscale(base, experts_of(base), **{"k": 8, "gate_k": 2, **options})


def test_the_budget_that_a_message_names_is_the_least() -> None:
    base = clip_tower()
    for budget, storage in itertools.product(("param_ratio", "byte_ratio"), ("same", "int8", "int4")):
        options = {"k": 8, "gate_k": 8, "storage": storage}
        with pytest.raises(ConfigError) as error:
            upscale(base, experts_of(base), **options, **{budget: 1.0001})
        needed = float(re.search(r"gate_k=8 needs ([\d.]+);", str(error.value))[1])
        upscale(base, experts_of(base), **options, **{budget: needed})  # the message is rounded up
        with pytest.raises(ConfigError, match="too little"):
            upscale(base, experts_of(base), **options, **{budget: needed - 0.001})


@pytest.mark.parametrize("budget", ["param_ratio", "byte_ratio"])
def test_a_model_with_a_budget_is_not_extended(budget: str) -> None:
    base = mlp()
    model = upscale(base, experts_of(base), k=8, gate_k=1, **{budget: 1.8})
    with pytest.raises(PlanError, match=f"{budget} can't be changed"):
        add_expert(model, experts_of(base, 4)[-1], "more")


def test_the_summary_groups_layers_by_the_last_part_of_their_names():
    layers = [LayerSpectra(name, ((), ()), (0, 0), True, 4, 4) for name in ("0.fc1", "1.fc1", "0.q_proj")]
    assert summarize_ranks(layers, [[1, 2], [3, 4], [5, 5]]) == {
        "fc1": "1 to 4, mean 2.5", "q_proj": "5 to 5, mean 5.0",
    }  # fmt: skip
