"""Calibrated routing: not zero-shot. A few unlabelled inputs of each expert's task say what its inputs look like.

Every task is a prototype in the space of what the pretrained model's layers make of an input: a mean, and one
covariance for all (linear discriminant analysis). The nearest prototype's expert serves an input; one that is far from
all of them can be told apart as of no known task. Imports torch alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

DIRECTIONS = 64  # of the covariance; in all others it is the same
SHRINKAGE = 0.2
QUANTILE, FOLDS = 0.99, 4


class Prototypes(nn.Module):
    """Prototypes of T tasks in a space of D features.

    The covariance is Σⱼ λⱼ pⱼpⱼᵀ + λ₀(1 − Σⱼ pⱼpⱼᵀ), of features divided by their own deviation.

    Attributes:
        mean: (T, D).
        scale: (D,), what features are divided by.
        directions: (r, D), the pⱼ, divided by λⱼ^½.
        rest: (1,), λ₀.
        variances: (r,), the λⱼ.
        radius: (1,), the distance within which nearly all inputs have their prototype: that of inputs which the
            prototypes were not fitted to, by cross-validation; infinite where there are too few.

    Every tensor is float32, and a parameter that isn't trained.
    """

    mean: Tensor
    scale: Tensor
    directions: Tensor
    rest: Tensor
    variances: Tensor
    radius: Tensor

    def __init__(self, tasks: int, features: int, directions: int) -> None:
        super().__init__()
        shapes = {
            "mean": (tasks, features), "scale": (features,), "directions": (directions, features),
            "variances": (directions,), "rest": (1,), "radius": (1,),
        }  # fmt: skip
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))

    @classmethod
    @torch.no_grad()
    def fit(cls, features: list[Tensor]) -> Prototypes:
        """Prototypes of tasks with these inputs' features: one (n, D) for each task, n at least 1."""
        made = cls._fitted(features)
        made.radius.fill_(torch.inf)
        if min(map(len, features)) >= FOLDS:
            away = []
            for fold in range(FOLDS):
                rest = [torch.cat([part for i, part in enumerate(_folds(f)) if i != fold]) for f in features]
                others, left_out = cls._fitted(rest), [_folds(of_task)[fold] for of_task in features]
                away += [others.distances(part.float())[:, task] for task, part in enumerate(left_out)]
            made.radius.copy_(torch.quantile(torch.cat(away), QUANTILE)[None])
        return made

    @classmethod
    def _fitted(cls, features: list[Tensor]) -> Prototypes:
        """Without a radius.

        The covariance is shrunk towards its mean variance: a few inputs say little of it.
        """
        everything = torch.cat(features).double()
        scale = everything.std(dim=0, correction=0).clamp(min=1e-3)
        scaled = [(of_task.double() / scale) for of_task in features]
        mean = torch.stack([of_task.mean(dim=0) for of_task in scaled])
        within = torch.cat([of_task - center for of_task, center in zip(scaled, mean, strict=True)])
        freedom = max(1, len(within) - len(features))
        kept = min(DIRECTIONS, max(0, len(within) - len(features)), within.shape[1])
        _, s, directions = torch.linalg.svd(within, full_matrices=False)
        variances = s.square() / freedom
        even = variances.sum() / within.shape[1] if freedom and variances.sum() > 0 else torch.ones((), dtype=s.dtype)
        others = variances[kept:].sum() / max(1, within.shape[1] - kept)
        made = cls(len(features), within.shape[1], kept)
        values = {
            "mean": mean, "scale": scale, "directions": directions[:kept],
            "variances": (1 - SHRINKAGE) * variances[:kept] + SHRINKAGE * even,
            "rest": ((1 - SHRINKAGE) * others + SHRINKAGE * even)[None],
        }  # fmt: skip
        for name, value in values.items():
            getattr(made, name).copy_(value)
        return made

    def distances(self, features: Tensor) -> Tensor:
        """The squared Mahalanobis distances of inputs (B, D) to the prototypes: (B, T)."""
        away = (features / self.scale)[:, None] - self.mean  # (B, T, D)
        along = (away @ self.directions.mT).square()
        across = (away.square().sum(-1) - along.sum(-1)).clamp(min=0)
        return (along / self.variances).sum(-1) + across / self.rest


def _folds(features: Tensor) -> list[Tensor]:
    return [features[fold::FOLDS] for fold in range(FOLDS)]
