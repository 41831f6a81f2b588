"""Prototypes of tasks for calibrated routing, fitted to a few unlabelled inputs of each expert's task.

Linear discriminant analysis in the space of `energy.routing_features`: one mean for each task and a shared, shrunk
covariance. The score of a task is a weighted sum of the prototypes' log-likelihood and the experts' zero-shot score;
cross-validation chooses both weights. Inputs that are far from all prototypes can be recognised as of an unknown task,
by the Mahalanobis distance and the relative Mahalanobis distance (arXiv 2106.09022, section 2).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

MAX_DIRECTIONS = 64  # of the covariance; its other eigenvalues are equal
SHRINKAGE = 0.2
QUANTILE, MAX_FOLDS = 0.975, 4


class Prototypes(nn.Module):
    """Prototypes of T tasks in a space of D = L·2·T features, for L layers.

    The covariance of standardised features is Σⱼ λⱼ pⱼpⱼᵀ + λ₀(1 − Σⱼ pⱼpⱼᵀ). All tensors are frozen, float32.
    Cross-validation gives `radius`, which is infinite where there are too few inputs, and `trust`. `rows` is the number
    of router rows of each expert, at most, that the features are computed with; None is all.
    """

    mean: Tensor  # (T, D), of standardised features
    scale: Tensor  # (D,), the standard deviations of the features
    directions: Tensor  # (r, D), the pⱼ
    rest: Tensor  # (1,), λ₀
    variances: Tensor  # (r,), the λⱼ
    radius: Tensor  # (2,), the 97.5 % quantiles of both columns of `remoteness`
    trust: Tensor  # (2,), the weights of log-likelihood −d²/2 and zero-shot scores, with the least cross-entropy

    def __init__(self, tasks: int, features: int, directions: int, rows: int | None = None) -> None:
        super().__init__()
        self.rows = rows
        shapes = {
            "mean": (tasks, features), "scale": (features,), "directions": (directions, features),
            "variances": (directions,), "rest": (1,), "radius": (2,), "trust": (2,),
        }  # fmt: skip
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))

    @staticmethod
    def num_parameters(tasks: int, layers: int, inputs: int) -> int:
        """The number of parameters of prototypes that are fitted to `inputs` inputs of each task."""
        features = 2 * tasks * layers
        return Prototypes.size(tasks, features, _num_directions(tasks, features, inputs * tasks))

    @staticmethod
    def size(tasks: int, features: int, directions: int) -> int:
        """The number of parameters of prototypes with these sizes: those of the seven tensors."""
        return tasks * features + features + (features + 1) * directions + 5

    @classmethod
    @torch.no_grad()
    def fit(cls, features: list[Tensor], cross_validate: bool = True, rows: int | None = None) -> Prototypes:
        """Fit prototypes to the features of each task's inputs, (n, D) with n at least 1.

        Without `cross_validate` only means and covariance are fitted, and `trust` and `radius` stay zero.
        """
        prototypes = cls._fit_distribution(features)
        prototypes.rows = rows
        if not cross_validate:
            return prototypes
        prototypes.radius.fill_(torch.inf)
        prototypes.trust[1] = 1.0  # one input of each task says too little about the prototypes
        if (folds := min(MAX_FOLDS, *map(len, features))) > 1:
            distances, scores, remoteness, tasks = cls._cross_validate(features, folds)
            prototypes.trust.copy_(_best_weights(-distances / 2, scores, tasks))
            if folds == MAX_FOLDS:
                prototypes.radius.copy_(torch.quantile(remoteness, QUANTILE, dim=0))
        return prototypes

    @classmethod
    def _cross_validate(cls, features: list[Tensor], folds: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Distances (N, T), zero-shot scores (N, T), remoteness (N, 2), tasks (N,), of prototypes without the fold."""
        results = []
        for fold in range(folds):
            prototypes = cls._fit_distribution([_without_fold(values, fold, folds) for values in features])
            for task, values in enumerate(features):
                held_out = values[fold::folds].float()
                labels = torch.full((len(held_out),), task, device=held_out.device)
                scores = prototypes.zero_shot_scores(held_out)
                results.append((prototypes.distances(held_out), scores, prototypes.remoteness(held_out), labels))
        distances, scores, remoteness, labels = (torch.cat(parts) for parts in zip(*results, strict=True))
        return distances, scores, remoteness, labels

    @classmethod
    def _fit_distribution(cls, features: list[Tensor]) -> Prototypes:
        """Fit means and covariance, which is shrunk towards its mean variance: a few inputs say little about it."""
        scale = torch.cat(features).double().std(dim=0, correction=0).clamp(min=1e-3)
        standardised = [values.double() / scale for values in features]
        mean = torch.stack([values.mean(dim=0) for values in standardised])
        residuals = torch.cat([values - center for values, center in zip(standardised, mean, strict=True)])
        degrees_of_freedom = max(1, len(residuals) - len(features))
        size = residuals.shape[1]
        kept = _num_directions(len(features), size, len(residuals))
        _, s, directions = torch.linalg.svd(residuals, full_matrices=False)
        variances = s.square() / degrees_of_freedom
        mean_variance = variances.sum() / size if variances.sum() > 0 else torch.ones((), dtype=s.dtype)
        rest = variances[kept:].sum() / max(1, size - kept)
        prototypes = cls(len(features), size, kept)
        values = {
            "mean": mean, "scale": scale, "directions": directions[:kept],
            "variances": (1 - SHRINKAGE) * variances[:kept] + SHRINKAGE * mean_variance,
            "rest": ((1 - SHRINKAGE) * rest + SHRINKAGE * mean_variance)[None],
        }  # fmt: skip
        for name, value in values.items():
            getattr(prototypes, name).copy_(value)
        return prototypes

    def zero_shot_scores(self, features: Tensor) -> Tensor:
        """The experts' scores without calibration of inputs (B, D): the sum of the ``dual`` features, (B, T)."""
        return features.unflatten(-1, (-1, 2, len(self.mean)))[..., 0, :].sum(-2)

    def scores(self, features: Tensor) -> Tensor:
        """The score of each task for inputs (B, D): (B, T)."""
        return self.trust[0] * (-self.distances(features) / 2) + self.trust[1] * self.zero_shot_scores(features)

    def distances(self, features: Tensor) -> Tensor:
        """The squared Mahalanobis distances of inputs (B, D) to the prototypes: (B, T)."""
        inputs, prototypes = self._whiten(features)
        return (inputs[:, None] - prototypes).square().sum(-1)

    def known(self, features: Tensor) -> Tensor:
        """Whether inputs (B, D) are within the radius of the prototypes: (B,), bool."""
        return (self.remoteness(features) <= self.radius).all(dim=-1)

    def remoteness(self, features: Tensor) -> Tensor:
        """The squared distance d² of inputs (B, D) to the nearest prototype, and d² − d₀²: (B, 2).

        The second is the relative Mahalanobis distance. d₀ is the distance to all tasks as one distribution, whose
        covariance is the prototypes' plus that between their means. It needs no further tensor:
        (Σ + CCᵀ)⁻¹ = Σ⁻¹ − Σ⁻¹C(1 + CᵀΣ⁻¹C)⁻¹CᵀΣ⁻¹. With a single task, d₀ is 0.
        """
        inputs, prototypes = self._whiten(features)
        nearest = (inputs[:, None] - prototypes).square().sum(-1).amin(dim=-1)
        if len(prototypes) == 1:
            return torch.stack([nearest, nearest], dim=-1)
        between = prototypes / len(prototypes) ** 0.5
        along, identity = inputs @ between.mT, torch.eye(len(between), device=inputs.device)
        common = inputs.square().sum(-1) - (along @ torch.linalg.inv(identity + between @ between.mT) * along).sum(-1)
        return torch.stack([nearest, nearest - common], dim=-1)

    def _whiten(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (B, D) and prototypes (T, D), centred on the prototypes' mean, in a basis of unit covariance."""
        centre = self.mean.mean(dim=0)
        points = torch.cat([features / self.scale, self.mean]) - centre
        along = (points @ self.directions.mT) * (self.variances**-0.5 - self.rest**-0.5)
        white = points * self.rest**-0.5 + along @ self.directions
        return white[: len(features)], white[len(features) :]


def _num_directions(tasks: int, features: int, inputs: int) -> int:
    """The number of directions of the covariance that so many inputs determine."""
    return min(MAX_DIRECTIONS, max(0, inputs - tasks), features)


def _without_fold(features: Tensor, fold: int, folds: int) -> Tensor:
    kept = torch.arange(len(features), device=features.device) % folds != fold
    return features[kept]


@torch.enable_grad()
def _best_weights(log_likelihoods: Tensor, scores: Tensor, tasks: Tensor) -> Tensor:
    """The positive weights of both scores (N, T) with the least cross-entropy for the tasks (N,): (2,)."""
    log_weights = torch.tensor([-3.0, -1.0], dtype=torch.double, device=scores.device, requires_grad=True)
    first, second = log_likelihoods.detach().double(), scores.detach().double()
    optimizer = torch.optim.LBFGS([log_weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = log_weights[0].exp() * first + log_weights[1].exp() * second
        # without an error, the cross-entropy falls with ever larger weights
        loss = cross_entropy(logits, tasks) + 1e-3 * log_weights.exp().square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return log_weights.detach().exp()
