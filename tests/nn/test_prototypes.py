"""Prototypes of tasks, against dense float64 algebra and cross-validation with the public methods."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import MultivariateNormal

from fusion_bench_smile.nn import Prototypes, count_parameters
from fusion_bench_smile.nn.prototypes import MAX_DIRECTIONS, MAX_FOLDS, QUANTILE, SHRINKAGE


def cross_validated(groups: list[Tensor], folds: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distances, zero-shot scores, remoteness and tasks of all inputs, by prototypes fitted without their fold."""
    parts = []
    for fold in range(folds):
        kept = [torch.arange(len(group)) % folds != fold for group in groups]
        others = [group[rows] for group, rows in zip(groups, kept, strict=True)]
        prototypes = Prototypes.fit(others, cross_validate=False)
        for task, group in enumerate(groups):
            x = group[fold::folds]
            labels = torch.full((len(x),), task)
            parts.append((prototypes.distances(x), prototypes.zero_shot_scores(x), prototypes.remoteness(x), labels))
    distances, scores, remoteness, labels = (torch.cat(values) for values in zip(*parts, strict=True))
    return distances, scores, remoteness, labels


@given(tasks=st.integers(1, 4), layers=st.integers(1, 3), count=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_distances_are_those_of_the_covariance(tasks: int, layers: int, count: int, seed: int) -> None:
    """Against dense float64 algebra with the inverse of the shrunk covariance."""
    features = layers * 2 * tasks
    generator = torch.Generator().manual_seed(seed)
    groups = [torch.randn(count, features, generator=generator) + 3 * i for i in range(tasks)]
    prototypes = Prototypes.fit(groups)
    standardised = [group.double() / prototypes.scale.double() for group in groups]
    residuals = torch.cat([group - group.mean(0) for group in standardised])
    covariance = residuals.mT @ residuals / max(1, len(residuals) - tasks)
    mean_variance = covariance.trace() / features if covariance.trace() > 0 else torch.tensor(1.0, dtype=torch.double)
    if min(MAX_DIRECTIONS, len(residuals) - tasks, features) < torch.linalg.matrix_rank(residuals):
        return  # the rest of the covariance is averaged
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * mean_variance * torch.eye(features)
    x = torch.randn(5, features, generator=generator)
    means = torch.stack([group.mean(0) for group in standardised])
    offsets = (x.double() / prototypes.scale.double())[:, None] - means
    expected = torch.einsum("btd,de,bte->bt", offsets, torch.linalg.inv(shrunk), offsets)
    torch.testing.assert_close(prototypes.distances(x).double(), expected, rtol=2e-3, atol=2e-3)
    # all tasks as one distribution: the covariance between their means is part of its covariance
    between = (means - means.mean(0)).mT @ (means - means.mean(0)) / tasks
    from_center = x.double() / prototypes.scale.double() - means.mean(0)
    common = torch.einsum("bd,de,be->b", from_center, torch.linalg.inv(shrunk + between), from_center)
    nearest = expected.amin(1)
    remoteness = torch.stack([nearest, nearest - common * (tasks > 1)], dim=1)
    tolerance = 2e-3 + 1e-5 * expected.max().item()  # both terms are as large as the largest distance
    torch.testing.assert_close(prototypes.remoteness(x).double(), remoteness, rtol=2e-3, atol=tolerance)


def test_known_inputs_are_near_one_prototype() -> None:
    """Two tasks differ in one feature: inputs between them, or far from both in any direction, are of neither."""
    groups = [torch.randn(400, 4) + torch.tensor([side, 0, 0, 0]) for side in (-8.0, 8.0)]
    prototypes = Prototypes.fit(groups)
    fresh = torch.cat([torch.randn(1000, 4) + torch.tensor([side, 0, 0, 0]) for side in (-8.0, 8.0)])
    assert 0.92 < prototypes.known(fresh).float().mean() < 0.98
    assert not prototypes.known(torch.randn(100, 4)).any()
    for direction in torch.eye(4):
        assert not prototypes.known(torch.stack([30 * direction, -30 * direction])).any()
    assert Prototypes.fit([group[:3] for group in groups]).known(fresh).all()  # there are too few inputs for a radius


def test_prototypes_find_the_optimal_boundary() -> None:
    """With the same covariance for all classes, the nearest prototype is the most likely class."""
    mixing = torch.randn(6, 6, dtype=torch.double)
    covariance = mixing @ mixing.mT + torch.eye(6)
    means = [2 * torch.randn(6, dtype=torch.double) for _ in range(3)]
    classes = [MultivariateNormal(mean, covariance) for mean in means]
    prototypes = Prototypes.fit([distribution.sample((4000,)).float() for distribution in classes])
    x = torch.cat([distribution.sample((500,)) for distribution in classes])
    likely = torch.stack([distribution.log_prob(x) for distribution in classes], dim=1).argmax(1)
    agreement = (prototypes.distances(x.float()).argmin(1) == likely).float().mean()
    assert agreement > 0.95


@given(count=st.integers(1, 12), spread=st.floats(0.1, 5.0), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_cross_validation_weights_likelihoods_and_scores(count: int, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tasks, layers = 3, 2
    groups = [torch.randn(count, layers * 2 * tasks, generator=generator) for _ in range(tasks)]
    for number, group in enumerate(groups):
        group[:, number] += spread  # an expert scores the inputs of its task higher
    prototypes = Prototypes.fit(groups)
    x = torch.cat(groups)
    scores = torch.stack([x[:, [e, 2 * tasks + e]].sum(1) for e in range(tasks)], dim=1)
    torch.testing.assert_close(prototypes.zero_shot_scores(x), scores)
    likelihood_weight, score_weight = prototypes.trust.tolist()
    expected = score_weight * scores - likelihood_weight / 2 * prototypes.distances(x)
    torch.testing.assert_close(prototypes.scores(x), expected)
    assert Prototypes.num_parameters(tasks, layers, count) == count_parameters(prototypes)
    if count == 1:  # one input of a task says nothing about the variance of its inputs
        assert prototypes.trust.tolist() == [0.0, 1.0]
        return
    distances, scores, _, labels = cross_validated(groups, min(MAX_FOLDS, count))
    least, *others = (
        torch.nn.functional.cross_entropy(a * -distances / 2 + b * scores, labels) + 1e-3 * (a**2 + b**2)
        for a, b in (prototypes.trust.tolist(), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.1, 0.3), (0.01, 1.0))
    )
    assert all(least <= other + 1e-4 for other in others)


@pytest.mark.parametrize("count", [3, 4, 10])
def test_the_radius_is_a_quantile_of_held_out_inputs(count: int) -> None:
    groups = [torch.randn(count, 4) + 3 * number for number in range(2)]
    prototypes = Prototypes.fit(groups)
    if count < MAX_FOLDS:
        assert prototypes.radius.isinf().all()
        return
    remoteness = cross_validated(groups, MAX_FOLDS)[2]
    torch.testing.assert_close(prototypes.radius.data, torch.quantile(remoteness, QUANTILE, dim=0))
