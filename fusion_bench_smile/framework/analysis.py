"""The studies as methods of the framework: ``fusion_bench method=smile_analysis/<name> modelpool=… taskpool=…``."""

import logging
import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from fusion_bench.method.base_algorithm import BaseAlgorithm
from fusion_bench.mixins.lightning_fabric import LightningFabricMixin
from fusion_bench.modelpool.base_pool import BaseModelPool
from hydra.core.hydra_config import HydraConfig
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor, nn

from .. import analysis as studies
from ..analysis import figures
from ..construction import upscale
from ..io import ExpertSource, write_atomically
from ..leaderboard.published import projection_merging
from ..nn import count_parameters
from ..reports import save_figure, task_results
from .model_pools import PRETRAINED, expert_source, load_model
from .program import single_task_config

log = logging.getLogger(__name__)

Results = tuple[dict[str, pd.DataFrame], dict[str, Figure]]  # tables and figures, by name


class Study(LightningFabricMixin, BaseAlgorithm):
    """A study of a model pool. It writes tables (CSV) and figures (PNG, SVG), and returns no model to evaluate.

    Args:
        output: the folder of tables and figures; None for the folder of the run.
        gate_k: rank of the router.
        k: rank of the experts.
        batches: number of batches of each task, for studies of inputs.
        target: share of ‖ΔW‖² that a recommended rank keeps.
    """

    _config_mapping = BaseAlgorithm._config_mapping | {"output": "output"}
    _program: Any  # of the run, set by the framework

    def __init__(
        self, *, output: str | None = None, gate_k: int = 16, k: int = 16, batches: int = 2, target: float = 0.95
    ) -> None:
        super().__init__()
        self._task_pools: dict[str, Any] = {}
        self.output, self.gate_k, self.k, self.batches, self.target = output, gate_k, k, batches, target

    def run(self, modelpool: BaseModelPool) -> None:
        """Run the study and write its tables and figures.

        Raises SmileError for models that can't be upscaled together, or a task pool without the tasks of the experts.
        """
        self.pool = modelpool
        self.pretrained = load_model(modelpool, PRETRAINED).eval()
        self.names = list(modelpool.model_names)
        self.experts = {name: expert_source(modelpool, name, self.pretrained) for name in self.names}
        tables, drawn = self.study()
        if not self.fabric.is_global_zero:
            return
        folder = Path(self.output or self.log_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            csv = table.to_csv(index=not isinstance(table.index, pd.RangeIndex))
            write_atomically(folder / f"{name}.csv", csv)
        for name, figure in drawn.items():
            save_figure(figure, folder / name)
        log.info("written to %s: %s", folder, ", ".join([*(f"{n}.csv" for n in tables), *(f"{n}.png" for n in drawn)]))

    @abstractmethod
    def study(self) -> Results:
        """The tables and figures of the study, by name."""

    def upscaled(self, experts: Mapping[str, ExpertSource] | None = None, **options: Any) -> nn.Module:
        """An upscaled model of some experts, or all. Options are those of `SmileConfig`; the study sets the ranks."""
        options = {"gate_k": self.gate_k, "k": self.k} | options
        return upscale(self.pretrained, self.experts if experts is None else experts, **options).eval()

    def individual(self, task: str) -> nn.Module:
        """The fine-tuned model of a task."""
        return load_model(self.pool, task).eval()

    @property
    def pool_name(self) -> str:
        """The configuration name of the model pool; empty outside of a Hydra run."""
        return str(HydraConfig.get().runtime.choices.get("modelpool")) if HydraConfig.initialized() else ""

    def task_pool(self, task: str) -> Any:
        """The task pool of the run with one task alone."""
        if task not in self._task_pools:
            config = getattr(self._program, "_taskpool", None) or DictConfig({})
            self._task_pools[task] = self._program._instantiate_and_setup(single_task_config(config, task))
        return self._task_pools[task]

    def score(self, model: nn.Module, task: str) -> float:
        """The score of a model on one task, in percent; NaN if undefined."""
        return _scores(self.task_pool(task).evaluate(model))[task]

    def scores(self, model: nn.Module) -> dict[str, float]:
        """The scores of a model on all tasks, in percent; NaN where undefined."""
        return _scores(self._program.taskpool.evaluate(model))

    def calls(self, task: str) -> list[studies.ModelCall]:
        """The first calls of a model in the evaluation of a task."""
        return studies.capture_calls(self.pretrained, self.task_pool(task).evaluate, self.batches)


class SubspaceEnergy(Study):
    """Energy of the task vectors in the singular subspaces of the pretrained weights."""

    def study(self) -> Results:
        """Table and figure ``subspace_energy``."""
        table = studies.subspace_energy(self.pretrained, self.experts)
        return _with_figure("subspace_energy", table, figures.subspace_energy)


class ProjectionMerging(Study):
    """Scores of the experts with task vectors projected onto one zone of the pretrained weights."""

    def study(self) -> Results:
        """Table and figure ``projection_merging``: one row for each zone, one column for each task, in percent.

        The table has published results for the same model pool, too, as rows with †.
        """
        rows: dict[str, dict[str, float]] = defaultdict(dict)
        for task in self.names:
            expert = self.individual(task)
            rows["pretrained"][task] = self.score(self.pretrained, task)
            for zone in studies.ZONES:
                projected = studies.project_onto_zone(self.pretrained, expert, zone)
                rows[f"zone {zone}"][task] = self.score(projected, task)
            rows["fine-tuned"][task] = self.score(expert, task)
        measured = _with_average(rows)
        published = projection_merging(self.pool_name, self.names).rename(index="{} †".format)
        return {"projection_merging": pd.concat([measured, published])}, {
            "projection_merging": figures.score_bars(measured)
        }


class ExplainedVariance(Study):
    """Explained variance of the task vectors by rank, and recommended ranks."""

    def study(self) -> Results:
        """Tables ``explained_variance``, ``ranks_needed``, ``recommendation``; figure ``explained_variance``."""
        variance = studies.explained_variance(self.pretrained, self.experts)
        advice = vars(studies.recommend(variance, count_parameters(self.pretrained), self.target))
        log.info("keeping %(kept).3f of ‖ΔW‖²: k=%(k)d, gate_k=%(gate_k)d, parameter ratio %(ratio).3f", advice)
        tables = {
            "explained_variance": variance.groupby(["type", "rank"], sort=False)["explained"].mean().reset_index(),
            "ranks_needed": studies.ranks_needed(variance),
            "recommendation": pd.DataFrame([advice]),
        }
        return tables, {"explained_variance": figures.explained_variance(variance)}


class RoutingStudy(Study):
    """Router accuracy, load and entropy of each layer on inputs of each task."""

    def study(self) -> Results:
        """Tables ``routing``, ``routing_confusion``, ``routing_layers`` and ``routing_gates``.

        Figures ``routing_confusion`` and ``routing_layers``; for images ``routing_tokens``, the expert of each patch.
        """
        model, calls = self.upscaled(), {task: self.calls(task) for task in self.names}
        table = studies.routing_by_task(model, calls, self.names)
        matrix, accuracy, load = studies.confusion(table), studies.layer_accuracy(table), studies.layer_load(table)
        entropy = table.groupby("layer", sort=False)["entropy"].mean()
        by_layer = load.add_prefix("load of ").assign(accuracy=accuracy, entropy=entropy)
        curves = figures.layer_curves(accuracy, load, entropy)
        drawn = {"routing_confusion": figures.confusion(matrix), "routing_layers": curves}
        tables = {"routing": table, "routing_confusion": matrix, "routing_layers": by_layer}
        tables["routing_gates"] = studies.coinciding_gates(model, self.names)
        return tables, drawn | _token_maps(model, calls, list(accuracy.index))


class ErrorAccumulation(Study):
    """Relative error of the hidden states against the individual models, by block."""

    def study(self) -> Results:
        """Table and figure ``error_accumulation``."""
        model, tables = self.upscaled(), []
        for task in self.names:
            oracle = self.upscaled({task: self.experts[task]})
            models = {"SMILE": model, "oracle routing": oracle, "pretrained": self.pretrained}
            errors = studies.error_accumulation(self.individual(task), models, self.calls(task))
            tables.append(errors.assign(task=task))
        return _with_figure("error_accumulation", pd.concat(tables, ignore_index=True), figures.error_accumulation)


class Ablations(Study):
    """Scores of variants of SMILE: top_k, leave-one-out experts, options, oracle routing, dense experts."""

    def study(self) -> Results:
        """Table and figure ``ablations``: one row for each variant, one column for each task, in percent."""
        rows = {name: self.scores(build()) for name, build in self._variants().items()}
        for label, k in {"oracle routing": self.k, "oracle routing, dense experts": -1}.items():
            rows[label] = {n: self.score(self.upscaled({n: expert}, k=k), n) for n, expert in self.experts.items()}
        rows["individual models"] = {name: self.score(self.individual(name), name) for name in self.names}
        return _with_figure("ablations", _with_average(rows), figures.ablations)

    def _variants(self) -> dict[str, Callable[[], nn.Module]]:
        """Name → function that builds the model."""
        remaining = {name: {n: e for n, e in self.experts.items() if n != name} for name in self.names}
        return {
            "SMILE": self.upscaled,
            **{f"top_k={k}": partial(self.upscaled, top_k=k) for k in (2, 4, 8) if k <= len(self.names)},
            **{f"without {name}": partial(self.upscaled, experts) for name, experts in remaining.items()},
            "routing_use_diff=false": partial(self.upscaled, routing_use_diff=False),
            "average_experts=true": partial(self.upscaled, average_experts=True),
            "k=-1 (dense experts)": partial(self.upscaled, k=-1),
        }


class Cost(Study):
    """Construction time, parameters, FLOPs and forward time over the number of experts and the ranks."""

    def study(self) -> Results:
        """Table and figure ``cost``."""
        count = len(self.names)
        points = [(count, self.gate_k, self.k)]
        points += [(number, self.gate_k, self.k) for number in sorted({1, 2, max(count // 2, 1)} - {count})]
        points += [(count, self.gate_k, k) for k in _smaller_ranks(self.k)]
        points += [(count, gate_k, self.k) for gate_k in _smaller_ranks(self.gate_k)]
        table = studies.costs(self.pretrained, self.experts, points, self.calls(self.names[0])[0])
        return _with_figure("cost", table, figures.costs)


def _with_figure(name: str, table: pd.DataFrame, draw: Callable[[pd.DataFrame], Figure]) -> Results:
    """A table and the figure that is drawn from it."""
    return {name: table}, {name: draw(table)}


def _scores(report: Any) -> dict[str, float]:
    """Task → score in the report of a task pool, in percent; NaN where undefined."""
    return {task: math.nan if each.score is None else each.score for task, each in task_results(report).items()}


def _smaller_ranks(rank: int) -> list[int]:
    """A quarter and a half of a rank."""
    return sorted({max(rank // 4, 1), max(rank // 2, 1)} - {rank})


def _with_average(rows: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """A table of scores with one row for each model, one column for each task, and the column ``average``."""
    table = pd.DataFrame(rows).T
    return table.assign(average=table.mean(axis=1))


def _token_maps(model: nn.Module, calls: Mapping[str, list[studies.ModelCall]], layers: list[str]) -> dict[str, Figure]:
    """The experts of all patches of one image of each task, in four layers; no figure if inputs are no images."""
    first = [task_calls[0] for task_calls in calls.values()]
    images = [image[0] for image in map(_images_of, first) if image is not None]
    if len(images) < len(first):
        return {}
    choices = {}
    for layer in _four_layers(layers):
        experts = [studies.token_choices(model, call, layer)[0] for call in first]
        # the class token comes before the patches
        patches = [tokens[len(tokens) - math.isqrt(len(tokens)) ** 2 :] for tokens in experts]
        *path, last = layer.split(".")
        choices[".".join([*filter(str.isdigit, path), last])] = torch.stack(patches)  # by a short name, e.g. 3.fc1
    return {"routing_tokens": figures.token_maps(torch.stack(images), choices, list(calls), list(calls))}


def _images_of(call: studies.ModelCall) -> Tensor | None:
    """The images (batch, channels, height, width) of a model call; None if there are none."""
    values = (value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor))
    return next((value for value in values if value.ndim == 4 and value.shape[1] in (1, 3)), None)


def _four_layers(layers: list[str]) -> list[str]:
    """Four layers from first to last: the first linear layers of MLPs, or any layers of a model without them."""
    mlp_layers = [name for name in layers if name.endswith(("fc1", "intermediate.dense"))] or layers
    return list(dict.fromkeys(mlp_layers[round(place * (len(mlp_layers) - 1) / 3)] for place in range(4)))
