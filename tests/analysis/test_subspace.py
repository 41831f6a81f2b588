"""Zones of W₀ against the full SVD in float64, and against the framework's analysis."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import clip_tower, perturbed
from fusion_bench.method.smile_upscaling.projected_energy import ProjectedEnergyAnalysis
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import require_version
from torch import nn

from fusion_bench_smile.analysis import Zones, project_onto_zone, subspace_energy

SHAPES = [(12, 12), (20, 8), (8, 20), (1, 6), (7, 1)]


def weight_and_delta(shape: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), 0.1 * torch.randn(shape, generator=generator)


def dense_zones(weight: torch.Tensor, delta: torch.Tensor) -> dict[str, torch.Tensor]:
    """The projections of a delta by the full SVD, in float64."""
    w, d = weight.double(), delta.double()
    u, s, vh = torch.linalg.svd(w, full_matrices=True)
    k = int((s.cumsum(0) < 0.5 * s.sum()).sum()) + 1
    r = len(s)

    def project(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return left @ left.T @ d @ right @ right.T

    return {
        "I": project(u[:, :k], vh[:k].T),
        "II": project(u[:, k:r], vh[k:r].T),
        "II+III": project(u[:, k:], vh[k:].T),
    }


@settings(deadline=None)
@given(st.tuples(st.integers(1, 24), st.integers(1, 24)), st.integers(0, 10))
def test_zones_are_those_of_the_full_svd(shape, seed):
    weight, delta = weight_and_delta(shape, seed)
    zones, total = Zones(weight.double()), delta.double().square().sum()
    for zone, expected in dense_zones(weight, delta).items():
        torch.testing.assert_close(zones.project(delta.double(), zone), expected, atol=1e-6, rtol=0)
        share = float(expected.square().sum() / total)
        assert zones.energy_shares(delta.double())[zone] == pytest.approx(share, abs=1e-6)


class FrameworkAnalysis(ProjectedEnergyAnalysis):
    """The framework's analysis, without a run."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")


@pytest.mark.parametrize("shape", SHAPES)
def test_shares_are_the_frameworks(shape):
    weight, delta = weight_and_delta(shape)
    require_version()
    expected = FrameworkAnalysis().analyze_weight(weight, weight + delta)
    shares = Zones(weight).energy_shares(delta)
    assert shares["I"] == pytest.approx(expected["projected_energy_I"], abs=1e-5)
    assert shares["II"] == pytest.approx(expected["projected_energy_II"], abs=1e-5)
    assert shares["II+III"] == pytest.approx(expected["projected_energy_II_III"], abs=1e-5)


@pytest.mark.parametrize("shape", [(30, 30), (60, 20), (20, 60)])
def test_shares_of_random_matrices(shape):
    zones = Zones(weight_and_delta(shape)[0])
    draws = [zones.energy_shares(weight_and_delta(shape, seed)[1]) for seed in range(1, 60)]
    for zone, expected in zones.random_shares().items():
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
def test_a_projected_expert_keeps_one_zone_of_its_deltas(zone):
    base = clip_tower()
    expert = perturbed(base, seed=1)
    before = copy.deepcopy(expert.state_dict())
    projected = project_onto_zone(base, expert, zone)
    for name, module in projected.named_modules():
        if isinstance(module, nn.Linear):
            start, end = base.get_submodule(name).weight.detach(), expert.get_submodule(name).weight.detach()
            expected = start.double() + dense_zones(start, end - start)[zone]
            torch.testing.assert_close(module.weight.double(), expected, atol=1e-4, rtol=0)
            assert torch.equal(module.bias, expert.get_submodule(name).bias)
    assert all(torch.equal(before[name], tensor) for name, tensor in expert.state_dict().items())
