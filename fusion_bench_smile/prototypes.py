"""Calibrated routing: not zero-shot. A few unlabelled inputs of each expert's task say what its inputs look like.

Every task is a prototype in the space of what the pretrained model's layers make of an input: a mean, and one
covariance for all (linear discriminant analysis). How near an input is to each, and what the experts score without any
calibration, are added up with two weights, by which inputs that the prototypes weren't fitted to find their task best.
An input that is far from all prototypes, or hardly nearer to one of them than to what all tasks have in common (the
relative Mahalanobis distance, arXiv 2106.09022, section 2), can be told apart as of no known task. Imports torch alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

DIRECTIONS = 64  # of the covariance; in all others it is the same
SHRINKAGE = 0.2
QUANTILE, FOLDS = 0.975, 4


class Prototypes(nn.Module):
    """Prototypes of T tasks in a space of D = L·2·T features.

    The features of an input are logarithms of shares of its tokens' energy, for each of L layers: first, for all
    experts, that of the coefficients on their router rows, then that on the rows weighted by singular values
    (`layers.Routed.energies`).

    The covariance is Σⱼ λⱼ pⱼpⱼᵀ + λ₀(1 − Σⱼ pⱼpⱼᵀ), of features divided by their own deviation.

    Attributes:
        mean: (T, D).
        scale: (D,), what features are divided by.
        directions: (r, D), the pⱼ.
        rest: (1,), λ₀.
        variances: (r,), the λⱼ.
        radius: (2,), what 97.5 % of inputs are below which the prototypes were not fitted to, by cross-validation,
            of each of `remoteness`; infinite where there are too few.
        trust: (2,), the weights of the prototypes' logarithmic likelihood −d²/2 and of the experts' scores, Σ over the
            layers of the features' first kind; by cross-validation, least cross-entropy.

    Every tensor is float32, and a parameter that isn't trained.
    """

    mean: Tensor
    scale: Tensor
    directions: Tensor
    rest: Tensor
    variances: Tensor
    radius: Tensor
    trust: Tensor

    def __init__(self, tasks: int, features: int, directions: int) -> None:
        super().__init__()
        shapes = {
            "mean": (tasks, features), "scale": (features,), "directions": (directions, features),
            "variances": (directions,), "rest": (1,), "radius": (2,), "trust": (2,),
        }  # fmt: skip
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))

    @staticmethod
    def parameters_for(tasks: int, layers: int, inputs: int) -> int:
        """How many parameters prototypes have that are fitted to so many inputs of each task, of routed layers."""
        features = 2 * tasks * layers
        inputs *= tasks
        return tasks * features + features + (features + 1) * _directions(tasks, features, inputs) + 5

    @classmethod
    @torch.no_grad()
    def fit(cls, features: list[Tensor]) -> Prototypes:
        """Prototypes of tasks with these inputs' features: one (n, D) for each task, n at least 1."""
        made = cls._fitted(features)
        made.radius.fill_(torch.inf)
        made.trust[1] = 1.0  # one input alone says too little
        if (folds := min(FOLDS, *map(len, features))) > 1:
            away, scores, remoteness, task = cls._cross_validated(features, folds)
            made.trust.copy_(_best_weights(-away / 2, scores, task))
            if folds == FOLDS:
                made.radius.copy_(torch.quantile(remoteness, QUANTILE, dim=0))
        return made

    @classmethod
    def _cross_validated(cls, features: list[Tensor], folds: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What prototypes that weren't fitted to them make of all inputs.

        Returns:
            distances (N, T), scores (N, T), remoteness (N, 2), and the inputs' tasks (N,).
        """
        found = []
        for fold in range(folds):
            others = cls._fitted([_without(of_task, fold, folds) for of_task in features])
            for task, of_task in enumerate(features):
                apart = of_task[fold::folds].float()
                tasks = torch.full((len(apart),), task, device=apart.device)
                found.append((others.distances(apart), others.scored(apart), others.remoteness(apart), tasks))
        distances, scored, remoteness, tasks = (torch.cat(parts) for parts in zip(*found, strict=True))
        return distances, scored, remoteness, tasks

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
        kept = _directions(len(features), within.shape[1], len(within))
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

    def scored(self, features: Tensor) -> Tensor:
        """The experts' own scores, without any calibration, of inputs (B, D): (B, T)."""
        return features.unflatten(-1, (-1, 2, len(self.mean)))[..., 0, :].sum(-2)

    def scores(self, features: Tensor) -> Tensor:
        """How well each task fits inputs (B, D), by their nearness to its prototype and its expert's score: (B, T)."""
        return self.trust[0] * (-self.distances(features) / 2) + self.trust[1] * self.scored(features)

    def distances(self, features: Tensor) -> Tensor:
        """The squared Mahalanobis distances of inputs (B, D) to the prototypes: (B, T)."""
        inputs, prototypes = self._whitened(features)
        return (inputs[:, None] - prototypes).square().sum(-1)

    def known(self, features: Tensor) -> Tensor:
        """Whether inputs (B, D) are as near to the prototypes as those of known tasks are: (B,)."""
        return (self.remoteness(features) <= self.radius).all(dim=-1)

    def remoteness(self, features: Tensor) -> Tensor:
        """Of inputs (B, D), the distance d² to the nearest prototype, and d² − d₀² (relative Mahalanobis): (B, 2).

        d₀ is the distance to all tasks taken as one, whose covariance is that of the prototypes plus that between them,
        so that nothing more has to be kept: (Σ + CCᵀ)⁻¹ = Σ⁻¹ − Σ⁻¹C(1 + CᵀΣ⁻¹C)⁻¹CᵀΣ⁻¹. A single task is no reference
        for itself: d₀ is 0 then.
        """
        inputs, prototypes = self._whitened(features)
        nearest = (inputs[:, None] - prototypes).square().sum(-1).amin(dim=-1)
        if len(prototypes) == 1:
            return torch.stack([nearest, nearest], dim=-1)
        between = prototypes / len(prototypes) ** 0.5
        along, ones = inputs @ between.mT, torch.eye(len(between), device=inputs.device)
        common = inputs.square().sum(-1) - (along @ torch.linalg.inv(ones + between @ between.mT) * along).sum(-1)
        return torch.stack([nearest, nearest - common], dim=-1)

    def _whitened(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (B, D) and the prototypes (T, D), from the mean of these, where the covariance is 1."""
        centre = self.mean.mean(dim=0)
        both = torch.cat([features / self.scale, self.mean]) - centre
        along = (both @ self.directions.mT) * (self.variances**-0.5 - self.rest**-0.5)
        white = both * self.rest**-0.5 + along @ self.directions
        return white[: len(features)], white[len(features) :]


def _directions(tasks: int, features: int, inputs: int) -> int:
    """How many directions of the covariance so many inputs tell of."""
    return min(DIRECTIONS, max(0, inputs - tasks), features)


def _without(features: Tensor, fold: int, folds: int) -> Tensor:
    kept = torch.arange(len(features), device=features.device) % folds != fold
    return features[kept]


@torch.enable_grad()
def _best_weights(likelihoods: Tensor, scores: Tensor, task: Tensor) -> Tensor:
    """The weights, above zero, with which both (N, T) together give the tasks (N,) the least cross-entropy."""
    logs = torch.tensor([-3.0, -1.0], dtype=torch.double, device=scores.device, requires_grad=True)
    first, second = likelihoods.detach().double(), scores.detach().double()
    optimizer = torch.optim.LBFGS([logs], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        # without any error, ever larger weights would be better
        loss = cross_entropy(logs[0].exp() * first + logs[1].exp() * second, task) + 1e-3 * logs.exp().square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return logs.detach().exp()
