"""Explained variance of truncated task vectors, and recommended ranks (arXiv 2408.10174, section 3)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn

from ..io import ExpertSource
from .task_vectors import layer_deltas


@torch.no_grad()
def explained_variance(pretrained: nn.Module, experts: Mapping[str, ExpertSource]) -> pd.DataFrame:
    """The energies of the singular values of all task vectors.

    Returns:
        One row for each layer, expert and rank from 1: ``layer``, ``type``, ``expert``, ``in``, ``out`` (the layer's
        sizes), ``rank``, ``energy`` (squared singular value) and ``explained`` (share of ‖ΔW‖² up to this rank, from 0
        to 1). Layers that an expert did not change have no rows.

    Raises:
        PlanError: If the models cannot be upscaled together.
    """
    tables = []
    for layer in layer_deltas(pretrained, experts):
        for expert, delta in layer.experts.items():
            energies = torch.linalg.svdvals(delta.double()).square().cpu().numpy()
            if energies.sum():
                tables.append(pd.DataFrame({
                    "layer": layer.name, "type": layer.type, "expert": expert,
                    "in": delta.shape[1], "out": delta.shape[0], "rank": np.arange(1, len(energies) + 1),
                    "energy": energies, "explained": energies.cumsum() / energies.sum(),
                }))  # fmt: skip
    return pd.concat(tables, ignore_index=True)


def ranks_needed(variance: pd.DataFrame, targets: tuple[float, ...] = (0.90, 0.95, 0.99)) -> pd.DataFrame:
    """The smallest rank of each task vector that keeps a share of its energy, for each of the shares from 0 to 1.

    Returns:
        One row for each layer and expert: ``layer``, ``type``, ``expert``, and a column for each target, e.g. ``90 %``.
    """
    by = ["layer", "type", "expert"]
    columns = {}
    for target in targets:
        sufficient = variance[variance["explained"] >= target * (1 - 1e-12)]
        columns[f"{100 * target:g} %"] = sufficient.groupby(by, sort=False)["rank"].min()
    return pd.DataFrame(columns).reset_index()


@dataclass(frozen=True)
class Recommendation:
    """Recommended ranks for upscaling."""

    k: int  # rank of the experts
    gate_k: int  # rank of the router; equal to k, because router rows up to k are shared with the experts at no cost
    kept: float  # share of the energy of all task vectors that rank k keeps, from 0 to 1
    ratio: float  # parameter ratio, without bias deltas


def recommend(variance: pd.DataFrame, parameters: int, target: float = 0.95) -> Recommendation:
    """The smallest k that keeps a share, from 0 to 1, of the energy of all task vectors together.

    Args:
        parameters: Number of parameters of the pretrained model.
    """
    kept = variance.groupby("rank")["energy"].sum().cumsum() / variance["energy"].sum()
    k = int(kept.index[kept >= min(target, kept.iloc[-1]) * (1 - 1e-12)][0])
    return Recommendation(k, k, float(kept[k]), 1 + added_parameters(variance, k) / parameters)


def added_parameters(variance: pd.DataFrame, k: int) -> int:
    """The number of parameters that experts and routers of rank k add, without bias deltas.

    Directions within rounding noise do not count.
    """
    top = variance.groupby(["layer", "expert"])["energy"].transform("max")
    noise = variance[["in", "out"]].max(axis=1) * np.finfo(np.float32).eps  # the threshold of `truncated_svd`
    significant = variance["energy"] > noise**2 * top
    kept = variance[significant & (variance["rank"] <= k)]
    return int((kept["in"] + kept["out"]).sum())
