"""The studies as methods of the framework: ``fusion_bench method=smile_analysis/<name> modelpool=… taskpool=…``."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from fusion_bench.method.base_algorithm import BaseAlgorithm
from fusion_bench.mixins.lightning_fabric import LightningFabricMixin
from fusion_bench.modelpool.base_pool import BaseModelPool
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor, nn

from ..ending import one_clear_line
from ..individual import own_task
from ..leaderboard.figures import save
from ..modelpool import expert_of, load_model
from ..report import task_results, write_whole
from ..sources import Openable
from ..upscale import upscale
from . import figures
from .accumulation import error_accumulation
from .cost import costs, parameters_of
from .inputs import Call, caught
from .routing import coinciding_gates, confusion, layer_accuracy, layer_load, routing_by_task, token_choices
from .subspace import ZONES, projected, subspace_energy
from .variance import explained_variance, ranks_needed, recommend

log = logging.getLogger(__name__)

PRETRAINED = "_pretrained_"
Tables = dict[str, pd.DataFrame]
Figures = dict[str, Figure]


class Study(LightningFabricMixin, BaseAlgorithm):
    """Studies a model pool, and writes tables (CSV) and pictures (PNG and SVG); gives no model to evaluate.

    Args:
        output: the folder; None is the run's own.
        options: of the study, see its configuration.
    """

    _config_mapping = BaseAlgorithm._config_mapping | {"output": "output"}

    def __init__(
        self, *, output: str | None = None, gate_k: int = 16, k: int = 16, batches: int = 2, target: float = 0.95
    ) -> None:
        super().__init__()
        self._task_pools: dict[str, Any] = {}
        self.output, self.gate_k, self.k, self.batches, self.target = output, gate_k, k, batches, target

    def run(self, modelpool: BaseModelPool) -> None:
        """Run the study and write what it found.

        Raises:
            SmileError: for models that can't be upscaled together, or a task pool that doesn't fit.
        """
        with one_clear_line():
            self.pool = modelpool
            self.pretrained = load_model(modelpool, PRETRAINED).eval()
            self.experts: dict[str, Openable] = {
                n: expert_of(modelpool, n, self.pretrained) for n in modelpool.model_names
            }
            tables, drawn = self.study()
        if self.fabric.is_global_zero:
            self._write(Path(self.output or self.log_dir or "."), tables, drawn)

    @abstractmethod
    def study(self) -> tuple[Tables, Figures]:
        """Tables and pictures by name."""

    # -- what studies share

    @property
    def names(self) -> list[str]:
        return list(self.experts)

    def upscaled(self, experts: Mapping[str, Openable] | None = None, **options: Any) -> nn.Module:
        """The upscaled model, of all experts with this study's ranks unless told otherwise."""
        chosen = {"gate_k": self.gate_k, "k": self.k} | options
        return upscale(self.pretrained, self.experts if experts is None else experts, **chosen).eval()

    def task_pool(self, task: str) -> Any:
        """The run's task pool with one task alone."""
        if task not in self._task_pools:
            program: Any = self._program
            config = getattr(program, "_taskpool", None)
            self._task_pools[task] = program._instantiate_and_setup(own_task(config or DictConfig({}), task))
        return self._task_pools[task]

    def score(self, model: nn.Module, task: str) -> float:
        """In percent; NaN if undefined."""
        found = task_results(self.task_pool(task).evaluate(model))[task].score
        return float("nan") if found is None else found

    def calls(self, task: str) -> list[Call]:
        """The first batches that the task pool gives to a model."""
        return caught(self.pretrained, self.task_pool(task).evaluate, self.batches)

    def _write(self, folder: Path, tables: Tables, drawn: Figures) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            write_whole(folder / f"{name}.csv", table.to_csv(index=not isinstance(table.index, pd.RangeIndex)))
        for name, figure in drawn.items():
            save(figure, folder / name)
        log.info("written to %s: %s", folder, ", ".join([*(f"{n}.csv" for n in tables), *(f"{n}.png" for n in drawn)]))


class SubspaceEnergy(Study):
    def study(self) -> tuple[Tables, Figures]:
        table = subspace_energy(self.pretrained, self.experts)
        return {"subspace_energy": table}, {"subspace_energy": figures.subspace_energy(table)}


class ProjectionMerging(Study):
    def study(self) -> tuple[Tables, Figures]:
        rows: dict[str, dict[str, float]] = {}
        for task in self.names:
            expert = load_model(self.pool, task).eval()
            models: dict[str, Callable[[], nn.Module]] = {
                "pretrained": lambda: self.pretrained,
                **{f"zone {z}": lambda z=z, e=expert: projected(self.pretrained, e, z) for z in ZONES},  # type: ignore[misc]
                "fine-tuned": lambda e=expert: e,  # type: ignore[misc]
            }
            for name, model in models.items():
                rows.setdefault(name, {})[task] = self.score(model(), task)
        table = pd.DataFrame(rows).T
        table["average"] = table.mean(axis=1)
        return {"projection_merging": table}, {"projection_merging": figures.scores(table)}


class ExplainedVariance(Study):
    def study(self) -> tuple[Tables, Figures]:
        variance = explained_variance(self.pretrained, self.experts)
        parameters = parameters_of(self.pretrained)
        advice = recommend(variance, parameters, self.target)
        log.info("keeping %(kept).3f of ‖ΔW‖²: k=%(k)d, gate_k=%(gate_k)d, parameter ratio %(ratio).3f", vars(advice))
        curves = variance.groupby(["type", "rank"], sort=False)["explained"].mean().reset_index()
        tables = {
            "explained_variance": curves,
            "ranks_needed": ranks_needed(variance),
            "recommendation": pd.DataFrame([vars(advice)]),
        }
        return tables, {"explained_variance": figures.explained_variance(variance)}


class RoutingStudy(Study):
    def study(self) -> tuple[Tables, Figures]:
        model = self.upscaled()
        calls = {task: self.calls(task) for task in self.names}
        table = routing_by_task(model, calls, self.names)
        matrix, accuracy, load = confusion(table), layer_accuracy(table), layer_load(table)
        entropy = table.groupby("layer", sort=False)["entropy"].mean()
        by_layer = load.add_prefix("load of ").assign(accuracy=accuracy, entropy=entropy)
        tables = {
            "routing": table,
            "routing_confusion": matrix,
            "routing_layers": by_layer,
            "routing_gates": coinciding_gates(model, self.names),
        }
        drawn = {
            "routing_confusion": figures.confusion(matrix),
            "routing_layers": figures.layers(accuracy, load, entropy),
        }
        maps = self._token_maps(model, calls, list(accuracy.index))
        return tables, drawn if maps is None else drawn | {"routing_tokens": maps}

    def _token_maps(self, model: nn.Module, calls: Mapping[str, list[Call]], layers: list[str]) -> Figure | None:
        """One image of each task, in four layers from first to last; None where the inputs are no images in patches."""
        first = {task: of_task[0] for task, of_task in calls.items()}
        images = [image for image in map(_images_of, first.values()) if image is not None]
        if len(images) < len(first):
            return None
        choices: dict[str, Tensor] = {}
        for layer in _four_of(layers):
            picked = [token_choices(model, call, layer)[0] for call in first.values()]
            # without the class token, which comes first
            choices[_short(layer)] = torch.stack(
                [tokens[len(tokens) - math.isqrt(len(tokens)) ** 2 :] for tokens in picked]
            )
        return figures.token_maps(torch.stack([image[0] for image in images]), choices, self.names, list(first))


class ErrorAccumulation(Study):
    def study(self) -> tuple[Tables, Figures]:
        model = self.upscaled()
        tables = []
        for task in self.names:
            others = {
                "SMILE": model,
                "its own expert alone": self.upscaled({task: self.experts[task]}),
                "pretrained": self.pretrained,
            }
            individual = load_model(self.pool, task).eval()
            tables.append(error_accumulation(individual, others, self.calls(task)).assign(task=task))
        table = pd.concat(tables, ignore_index=True)
        return {"error_accumulation": table}, {"error_accumulation": figures.error_accumulation(table)}


class Ablations(Study):
    def study(self) -> tuple[Tables, Figures]:
        variants: dict[str, Callable[[], nn.Module]] = {"SMILE": self.upscaled}
        for top_k in (2, 4, 8):
            if top_k <= len(self.names):
                variants[f"top_k={top_k}"] = lambda top_k=top_k: self.upscaled(top_k=top_k)  # type: ignore[misc]
        for name in self.names:
            others = {other: expert for other, expert in self.experts.items() if other != name}
            variants[f"without {name}"] = lambda others=others: self.upscaled(others)  # type: ignore[misc]
        variants |= {
            "routing_use_diff=false": lambda: self.upscaled(routing_use_diff=False),
            "average_experts=true": lambda: self.upscaled(average_experts=True),
            "k=-1 (dense experts)": lambda: self.upscaled(k=-1),
        }
        rows = {name: self._scores(make()) for name, make in variants.items()}
        for label, k in {"oracle routing": self.k, "oracle routing, dense experts": -1}.items():
            rows[label] = {n: self.score(self.upscaled({n: expert}, k=k), n) for n, expert in self.experts.items()}
        rows["individual models"] = {name: self.score(load_model(self.pool, name).eval(), name) for name in self.names}
        table = pd.DataFrame(rows).T
        table["average"] = table.mean(axis=1)
        return {"ablations": table}, {"ablations": figures.ablations(table)}

    def _scores(self, model: nn.Module) -> dict[str, float]:
        program: Any = self._program
        results = task_results(program.taskpool.evaluate(model))
        return {task: float("nan") if result.score is None else result.score for task, result in results.items()}


class Cost(Study):
    def study(self) -> tuple[Tables, Figures]:
        count = len(self.names)
        experts = sorted({1, 2, max(count // 2, 1), count})
        ranks = sorted({max(self.k // 4, 1), max(self.k // 2, 1), self.k})
        gates = sorted({max(self.gate_k // 4, 1), max(self.gate_k // 2, 1), self.gate_k})
        points = [(count, self.gate_k, self.k)]
        points += [(t, self.gate_k, self.k) for t in experts if t != count]
        points += [(count, self.gate_k, k) for k in ranks if k != self.k]
        points += [(count, gate_k, self.k) for gate_k in gates if gate_k != self.gate_k]
        table = costs(self.pretrained, self.experts, points, self.calls(self.names[0])[0])
        return {"cost": table}, {"cost": figures.costs(table)}


def _images_of(call: Call) -> Tensor | None:
    """The images (batch, channels, height, width) that a call gives to the model."""
    values = (value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor))
    return next((value for value in values if value.ndim == 4 and value.shape[1] in (1, 3)), None)


def _four_of(layers: list[str]) -> list[str]:
    """The first linear layers of the MLPs, or of whatever there is, of four blocks from first to last."""
    wide = [name for name in layers if name.endswith(("fc1", "intermediate.dense"))] or layers
    return list(dict.fromkeys(wide[round(place * (len(wide) - 1) / 3)] for place in range(4)))


def _short(layer: str) -> str:
    """A layer's name without what all names have, e.g. ``3.fc1``."""
    *path, last = layer.split(".")
    return ".".join([*(part for part in path if part.isdigit()), last])
