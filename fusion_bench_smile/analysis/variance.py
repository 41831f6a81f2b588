"""How much of the task vectors a rank keeps, and which rank to choose (arXiv 2408.10174, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn

from ..sources import Openable
from .deltas import layer_deltas

TARGETS = (0.90, 0.95, 0.99)


@torch.no_grad()
def explained_variance(pretrained: nn.Module, experts: Mapping[str, Openable]) -> pd.DataFrame:
    """The singular values of all task vectors.

    Returns:
        One row for each layer, expert and rank from 1 on: ``layer``, ``type``, ``expert``, ``in``, ``out``, ``rank``,
        ``energy`` (s², of that direction) and ``explained`` (the share of ‖ΔW‖² that the ranks up to it keep, from 0 to
        1). Layers that an expert left as they are have no rows.

    Raises:
        PlanError: for models that can't be upscaled together.
    """
    tables = []
    for layer in layer_deltas(pretrained, experts):
        for expert, delta in layer.experts.items():
            energies = torch.linalg.svdvals(delta.double()).square().cpu().numpy()
            if energies.sum():
                named = {
                    "layer": layer.name,
                    "type": layer.type,
                    "expert": expert,
                    "in": delta.shape[1],
                    "out": delta.shape[0],
                }
                explained = energies.cumsum() / energies.sum()
                ranks = np.arange(1, len(energies) + 1)
                tables.append(pd.DataFrame({**named, "rank": ranks, "energy": energies, "explained": explained}))
    return pd.concat(tables, ignore_index=True)


def ranks_needed(variance: pd.DataFrame, targets: tuple[float, ...] = TARGETS) -> pd.DataFrame:
    """The rank that each task vector needs to keep a share of its energy.

    Args:
        variance: from `explained_variance`.

    Returns:
        One row for each layer and expert, one column for each target, e.g. ``90 %``.
    """
    by = ["layer", "type", "expert"]
    columns = {}
    for target in targets:
        enough = variance[variance["explained"] >= target * (1 - 1e-12)]
        columns[f"{100 * target:g} %"] = enough.groupby(by, sort=False)["rank"].min()
    return pd.DataFrame(columns).reset_index()


@dataclass(frozen=True)
class Recommendation:
    """Ranks for SMILE.

    Attributes:
        k, gate_k: router rows up to k are the experts' own directions, and cost nothing: both are the same.
        kept: the share of all task vectors' energy that they keep together.
        ratio: the parameter ratio, without changed biases.
    """

    k: int
    gate_k: int
    kept: float
    ratio: float


def recommend(variance: pd.DataFrame, parameters: int, target: float = 0.95) -> Recommendation:
    """The smallest k that keeps a share of the energy of all task vectors together.

    Args:
        variance: from `explained_variance`.
        parameters: of the pretrained model.
    """
    total = variance["energy"].sum()
    kept = variance.groupby("rank")["energy"].sum().sort_index().cumsum() / total
    k = int(kept.index[kept >= min(target, kept.iloc[-1]) * (1 - 1e-12)][0])
    return Recommendation(k, k, float(kept[k]), 1 + added_parameters(variance, k) / parameters)


def added_parameters(variance: pd.DataFrame, k: int) -> int:
    """What experts of rank k add, where no task vector has a direction of rounding noise."""
    top = variance.groupby(["layer", "expert"])["energy"].transform("max")
    size = variance[["in", "out"]].max(axis=1)
    real = variance["energy"] > (size * np.finfo(np.float32).eps) ** 2 * top  # as `truncated_svd` tells noise apart
    used = variance[real & (variance["rank"] <= k)]
    return int((used["in"] + used["out"]).sum())
