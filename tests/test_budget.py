"""Ranks that fit a budget of parameters, and factors in fewer bytes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from conftest import clip_inputs, clip_tower, experts_of, mlp, mlp_inputs, output, t5, t5_inputs, tied_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fusion_bench_smile import ConfigError, PlanError, add_expert, as_expert, load, save, upscale, upscale_to_folder
from fusion_bench_smile.budget import LayerSpectra, allocate
from fusion_bench_smile.checkpoint import section_of
from fusion_bench_smile.layers import Routed
from fusion_bench_smile.storage import bytes_of, quantized

HOW = ("uniform", "energy", "gain")


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@st.composite
def spectra(draw: st.DrawFn) -> list[LayerSpectra]:
    experts = draw(st.integers(1, 4))
    layers = []
    for number in range(draw(st.integers(1, 4))):
        energies = tuple(
            tuple(sorted(draw(st.lists(st.floats(1e-6, 10.0), max_size=6)), reverse=True)) for _ in range(experts)
        )
        gates = tuple(min(draw(st.integers(0, 3)), len(of_expert)) for of_expert in energies)
        layers.append(
            LayerSpectra(
                str(number), draw(st.integers(1, 20)), draw(st.integers(1, 20)), energies, gates,
                draw(st.booleans()), draw(st.floats(0.1, 10.0)), draw(st.integers(0, 9)), draw(st.integers(0, 1)),
            )
        )  # fmt: skip
    return layers


def cost(layers: list[LayerSpectra], ranks: list[list[int]]) -> int:
    """Counted as the layers store it, not step by step."""
    total = 0
    for layer, of_layer in zip(layers, ranks, strict=True):
        columns, rows = layer.in_features + layer.scales, layer.out_features + layer.scales
        total += layer.biases + sum(layer.gate_ranks) * columns
        for rank, gate in zip(of_layer, layer.gate_ranks, strict=True):
            own = rank - min(rank, gate) if layer.shared else rank
            total += own * columns + rank * rows
    return total


@given(layers=spectra(), budget=st.integers(0, 2000), how=st.sampled_from(HOW))
@settings(max_examples=150, deadline=None)
def test_a_budget_is_used_and_never_exceeded(layers: list[LayerSpectra], budget: int, how: str) -> None:
    fixed = sum(layer.fixed for layer in layers)
    if budget < fixed:
        with pytest.raises(ConfigError):
            allocate(layers, budget, how)
        return
    ranks = allocate(layers, budget, how)
    assert cost(layers, ranks) <= budget
    for place, (layer, of_layer) in enumerate(zip(layers, ranks, strict=True)):
        for expert, rank in enumerate(of_layer):
            assert layer.least(expert) <= rank <= len(layer.energies[expert])
            if rank < len(layer.energies[expert]):  # nothing more could be bought
                larger = [list(other) for other in ranks]
                larger[place][expert] += 1
                assert cost(layers, larger) > budget


def test_energy_keeps_more_than_uniform_does() -> None:
    generator = torch.Generator().manual_seed(0)

    def energies(scale: float) -> tuple[float, ...]:
        return tuple((scale * torch.rand(8, generator=generator)).sort(descending=True).values.tolist())

    layers = [LayerSpectra(str(i), 10, 10, (energies(10.0**i), energies(1.0)), (0, 0), True, 10.0**i) for i in range(3)]

    def kept(how: str) -> float:
        ranks = allocate(layers, 200, how)
        pairs = zip(layers, ranks, strict=True)
        return sum(sum(e[:r]) for layer, of in pairs for e, r in zip(layer.energies, of, strict=True))

    exhaustive = max(
        sum(
            sum(e[:r])
            for layer, of in zip(layers, choice, strict=True)
            for e, r in zip(layer.energies, of, strict=True)
        )
        for choice in itertools.product(list(itertools.product(range(9), repeat=2)), repeat=3)
        if sum(map(sum, choice)) == 10
    )
    assert kept("energy") == pytest.approx(exhaustive)
    assert kept("energy") > kept("uniform")
    assert allocate(layers, 200, "gain") != allocate(layers, 200, "energy")


@pytest.mark.parametrize("make", [clip_tower, mlp, t5, tied_llama])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("ratio", "storage"), [(1.4, "same"), (1.7, "same"), (1.7, "int8")])
def test_a_model_has_exactly_what_it_says(make: Callable[[], nn.Module], how: str, ratio: float, storage: str) -> None:
    base = make()
    model = upscale(base, experts_of(base), k=12, gate_k=1, param_ratio=ratio, allocation=how, storage=storage)
    found = parameters(model)
    assert found <= ratio * parameters(base)
    assert list(section_of(model).recipe["parameters"]) == [parameters(base), found]
    layers = [module for module in model.modules() if isinstance(module, Routed)]
    if any(max(layer.layout.ranks) < 12 for layer in layers):  # the budget was the limit
        dearest = max(layer.weight.shape[0] + layer.weight.shape[1] for layer in layers)
        assert found > ratio * parameters(base) - 2 * dearest


def test_ranks_are_ragged_and_stored_so(tmp_path) -> None:
    base = clip_tower()
    model = upscale(base, experts_of(base), k=12, gate_k=2, param_ratio=1.6, allocation="energy")
    layouts = [module.layout for module in model.modules() if isinstance(module, Routed)]
    assert len({rank for layout in layouts for rank in layout.ranks}) > 1
    for layer in (module for module in model.modules() if isinstance(module, Routed)):
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
        if isinstance(layer, Routed):
            whole = full.get_submodule(name)
            for expert, rank in enumerate(layer.layout.ranks):
                own = layer.rows("up", layer.layout.low_ranks, expert)
                assert torch.equal(own, whole.rows("up", whole.layout.low_ranks, expert)[:rank])
                assert torch.equal(layer._directions(expert), whole._directions(expert)[:rank])
    kept = section_of(fitted).recipe["energy"]
    every = section_of(full).recipe["energy"]
    assert all(a <= b + 1e-6 for name in kept for a, b in zip(kept[name], every[name], strict=True))


def test_own_parameters_and_noise_baseline_are_within_the_budget() -> None:
    base = clip_tower()
    options = {"routing_scope": "two_pass", "expert_parameters": "all", "noise_baseline": True}
    model = upscale(base, experts_of(base), k=12, gate_k=1, param_ratio=1.6, **options)
    found = parameters(model)
    assert found <= 1.6 * parameters(base)
    assert section_of(model).recipe["parameters"][1] == found


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
def test_budgets_that_can_not_be_are_refused(options: dict[str, object], message: str) -> None:
    base = clip_tower()
    with pytest.raises(ConfigError, match=message):
        upscale(base, experts_of(base), **{"k": 8, "gate_k": 2, **options})


def test_a_model_with_a_budget_is_not_extended() -> None:
    base = mlp()
    model = upscale(base, experts_of(base), k=8, gate_k=1, param_ratio=1.8)
    with pytest.raises(PlanError, match="param_ratio can't be changed"):
        add_expert(model, experts_of(base, 4)[-1], "more")


@given(rows=st.integers(1, 5), columns=st.integers(1, 9), scale=st.floats(1e-6, 1e4), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_int8_rows_are_off_by_half_a_step(rows: int, columns: int, scale: float, seed: int) -> None:
    values = scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    values[0] = 0
    numbers, steps = quantized(values)
    assert numbers.dtype == torch.int8
    assert steps.shape == (rows, 1)
    again = numbers * steps
    assert ((again - values).abs() <= 0.5001 * steps + 1e-30).all()
    assert not again[0].any()
    assert torch.equal(quantized(again)[0], numbers)  # what was stored once stays the same


@pytest.mark.parametrize("make", [(clip_tower, clip_inputs), (mlp, mlp_inputs), (t5, t5_inputs)])
@pytest.mark.parametrize("options", [{}, {"execution": "grouped"}, {"top_k": 2}, {"k": -1}, {"gate_k": 8, "k": 4}])
def test_int8_factors_are_smaller_and_nearly_as_good(make, options: dict[str, object], tmp_path) -> None:
    base, inputs = (part() for part in make)
    experts = experts_of(base)
    options = {"k": 8, "gate_k": 4, "routing_scope": "two_pass", **options}
    plain, small = (upscale(base, experts, storage=storage, **options) for storage in ("same", "int8"))
    own = bytes_of(base)
    assert bytes_of(small) - own < 0.5 * (bytes_of(plain) - own)
    layer = next(module for module in small.modules() if isinstance(module, Routed))
    assert layer.gate.dtype == torch.int8
    assert not layer.gate.requires_grad
    with as_expert(plain, "1"), as_expert(small, "1"):  # near a tie rounding may choose another expert
        expected, found = output(plain, inputs), output(small, inputs)
        assert (found - expected).norm() < 0.05 * (expected - output(base, inputs)).norm()
    found = output(small, inputs)
    save(small, tmp_path / "model")
    loaded = load(tmp_path / "model", base if make[0] is mlp else None)
    assert torch.equal(output(loaded, inputs), found)
    assert parameters(loaded) == section_of(small).recipe["parameters"][1]


def test_int8_models_change_dtype_and_experts() -> None:
    base = mlp()
    experts = experts_of(base)
    small = upscale(base, experts[:2], k=6, gate_k=3, storage="int8")
    assert all(m.up.dtype == torch.int8 for m in small.double().modules() if isinstance(m, Routed))
    small.float()
    larger = add_expert(small, experts[2], "2")
    inputs = mlp_inputs()
    expected = output(upscale(base, experts, k=6, gate_k=3, storage="int8"), inputs)
    torch.testing.assert_close(output(larger, inputs), expected, atol=1e-5, rtol=1e-5)


def test_what_streams_to_disk(tmp_path) -> None:
    base = clip_tower()
    base.save_pretrained(tmp_path / "base")
    for number, expert in enumerate(experts_of(base)):
        expert.save_pretrained(tmp_path / str(number))
    experts = {str(number): tmp_path / str(number) for number in range(3)}
    upscale_to_folder(
        tmp_path / "base", experts, tmp_path / "out", k=8, gate_k=4, storage="int8", routing_scope="two_pass"
    )
    model = upscale(base, experts, k=8, gate_k=4, storage="int8", routing_scope="two_pass")
    inputs = clip_inputs()
    assert torch.equal(output(load(tmp_path / "out").eval(), inputs), output(model, inputs))
    with pytest.raises(ConfigError, match=r"param_ratio=1\.5 needs the whole model"):
        upscale_to_folder(tmp_path / "base", experts, tmp_path / "out2", k=8, gate_k=1, param_ratio=1.5)
    assert not (tmp_path / "out2").exists()
