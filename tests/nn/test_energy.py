"""The energy shares that score whole inputs, against direct float64 algebra."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import clip_tower, experts_of
from layers import RAGGED, UNIFORM, random_layer
from torch import nn

from fusion_bench_smile import SmileConfig, upscale
from fusion_bench_smile.nn import (
    RIDGE,
    SCORED_ROWS,
    InputRouter,
    RoutedLayer,
    energy_shares,
    num_scored_rows,
    router_singular_values,
    routing_features,
    token_energies,
)


@pytest.mark.parametrize("rows", [None, 2, SCORED_ROWS])
@pytest.mark.parametrize("storage", ["same", "int8", "int4"])
def test_shares_and_features_are_their_formulas(storage: str, rows: int | None) -> None:
    """The router rows of the experts overlap, and the leading ones count."""
    tower = clip_tower()
    model = upscale(tower, experts_of(tower), k=8, gate_k=4, storage=storage)
    layer = next(layer for layer in model.modules() if isinstance(layer, RoutedLayer))
    x, used = torch.randn(2, 5, layer.weight.shape[1]), min(4, rows or 4)
    leading = [layer.rows("gate", expert)[:used].double() for expert in range(3)]
    values = [layer.rows("up", expert)[:used].double().norm(dim=1) for expert in range(3)]
    y, all_rows = x.double(), torch.cat(leading)
    gram = all_rows @ all_rows.mT + RIDGE * torch.eye(len(all_rows), dtype=torch.double)
    coefficients = torch.linalg.solve(gram, (y @ all_rows.mT).flatten(0, 1).mT).mT.view(2, 5, -1).split(used, -1)
    energy = y.square().sum(-1)
    shares = [c.square().sum(-1) / energy for c in coefficients]
    weighted = [((y @ r.mT) * s).square().sum(-1) / energy for r, s in zip(leading, values, strict=True)]
    for function, parts in ((energy_shares, shares), (routing_features, [*shares, *weighted])):
        expected = torch.stack(parts, dim=-1).float()
        torch.testing.assert_close(function(layer, x, rows), expected, atol=1e-4, rtol=1e-3)


def test_energy_shares_are_small_of_zero_and_independent_of_the_size_of_a_token():
    layer, x = random_layer(UNIFORM, 6, 5), torch.randn(4, 6, dtype=torch.float64)
    shares = energy_shares(layer, x)
    torch.testing.assert_close(energy_shares(layer, 1e6 * x), shares)
    assert energy_shares(layer, 0 * x).abs().max() == 0


@pytest.mark.parametrize("storage", ["same", "int8", "int4"])
def test_energy_shares_follow_the_router_rows(storage: str) -> None:
    """What is kept of the rows is computed again when they change in any way."""
    tower, x = clip_tower(), torch.randn(4, 32)
    models = [upscale(tower, experts_of(tower, 3, scale), k=8, gate_k=4, storage=storage) for scale in (0.05, 0.2)]
    layer, other = (next(module for module in model.modules() if isinstance(module, RoutedLayer)) for model in models)

    def replace(dimension: int) -> None:
        layer.gate = nn.Parameter(layer.gate.flip(dimension), requires_grad=False)

    def replace_data() -> None:
        """As casts of the model do; the second one may have the memory of the kept rows, too."""
        dtype = layer.gate.dtype
        layer.gate.data = layer.gate.flip(0).double()
        layer.gate.data = layer.gate.to(dtype)

    energy_shares(layer, x)
    for change in (
        lambda: layer.load_state_dict(other.state_dict()),
        *[lambda: replace(0) or replace(1)] * 20,  # the second one may have the memory of the kept rows
        lambda: layer.gate_scale.copy_(layer.gate_scale + 1) if storage != "same" else layer.gate.mul_(2),
        lambda: setattr(layer.gate, "data", layer.gate.flip(0)),
        *[replace_data] * 20,
        lambda: layer.half().float(),
    ):
        with torch.no_grad():
            change()
        assert torch.equal(energy_shares(layer, x), energy_shares(copy.deepcopy(layer), x))
        assert torch.equal(routing_features(layer, x), routing_features(copy.deepcopy(layer), x))
    layer.up.data = layer.up.flip(0)
    assert torch.equal(routing_features(layer, x), routing_features(copy.deepcopy(layer), x))


def test_singular_values_are_zero_for_rows_that_are_no_direction():
    layer = random_layer(RAGGED, 6, 5)  # the third expert has three router rows and two directions
    values = router_singular_values(layer)
    assert values.shape == (5,)
    torch.testing.assert_close(values[:2], layer.up[:2].float().norm(dim=1))
    torch.testing.assert_close(values[2:4], layer.up[4:].float().norm(dim=1))
    assert values[4] == 0


def test_token_energies_are_positive():
    layer, x = random_layer(UNIFORM, 6, 5), torch.randn(4, 6, dtype=torch.float64)
    x[0] = 0
    energies = token_energies(layer, x)
    assert energies.shape == (4, 1)
    torch.testing.assert_close(energies[1:, 0], x[1:].square().sum(-1))
    assert energies[0] > 0


@pytest.mark.parametrize(("experts", "rows"), [(1, 16), (8, 16), (9, 18), (14, 28), (20, 40)])
def test_many_experts_are_scored_by_more_rows(experts: int, rows: int) -> None:
    assert num_scored_rows(experts) == rows
    assert InputRouter(SmileConfig(routing_scope="input"), [str(index) for index in range(experts)]).scored_rows == rows
