"""The framework's method: a thin adapter from a model pool to `upscale`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

from fusion_bench.method.base_algorithm import BaseAlgorithm
from fusion_bench.mixins.lightning_fabric import LightningFabricMixin
from fusion_bench.mixins.simple_profiler import SimpleProfilerMixin
from fusion_bench.modelpool.base_pool import BaseModelPool
from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm.auto import tqdm

from .calibration import calibrate, check_calibration
from .checkpoint import check_writable, is_checkpoint, load, save, section_of
from .config import SmileConfig, check_keys
from .ending import one_clear_line
from .errors import PlanError
from .factors import truncated_svd
from .modelpool import calibration_inputs, expert_of, load_model
from .plan import estimated_seconds
from .sources import Openable
from .store import FactorStore
from .upscale import plan_upscaling, upscale

log = logging.getLogger(__name__)

PRETRAINED = "_pretrained_"
OPTIONS = [field.name for field in fields(SmileConfig)]
OF_THE_RUN = ["model_path", "factor_cache", "dry_run", "calibration"]


class SmileUpscalingAlgorithm(LightningFabricMixin, SimpleProfilerMixin, BaseAlgorithm):
    """SMILE upscaling (arXiv 2408.10174, section 4) as a method of the framework.

    Args:
        model_path: a folder. If it holds a checkpoint, that is loaded instead of upscaling; else the upscaled model is
            saved there.
        factor_cache: a folder where factors are kept and looked up, so that sweeps and restarts factor nothing twice;
            None keeps none.
        calibration: this many unlabelled inputs of each expert's training set choose the experts (`calibrate`), which
            is not zero-shot; 0 for none.
        dry_run: print what would be done, and return None, for which the framework saves and evaluates nothing.
        options: the fields of `SmileConfig`; the names are those of the framework's own SMILE.

    Raises:
        ConfigError: for an unknown option, or a value that can't work.
    """

    _config_mapping = BaseAlgorithm._config_mapping | {name: name for name in [*OPTIONS, *OF_THE_RUN]}

    def __init__(
        self,
        *,
        model_path: str | None = None,
        factor_cache: str | None = None,
        calibration: int = 0,
        dry_run: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        with one_clear_line():
            check_keys(options, [*OPTIONS, *OF_THE_RUN])
            plain = {key: OmegaConf.to_object(v) if OmegaConf.is_config(v) else v for key, v in options.items()}
            self.options = SmileConfig.from_dict(plain)
            check_calibration(calibration, self.options)
        self.model_path, self.factor_cache, self.dry_run = model_path, factor_cache, dry_run
        self.calibration = calibration
        for name in OPTIONS:  # what the framework reads for `self.config`
            setattr(self, name, getattr(self.options, name))

    def run(self, modelpool: BaseModelPool | Mapping[str, nn.Module] | Sequence[nn.Module]) -> nn.Module | None:
        """Upscale the models of a pool.

        Args:
            modelpool: a model pool, a mapping with the key ``_pretrained_``, or a sequence whose first entry is the
                pretrained model.

        Returns:
            The upscaled model, on the CPU unless the pool put the pretrained model elsewhere; None for a dry run.

        Raises:
            SmileError: for whatever can't be upscaled, loaded or saved; see `upscale`, `load` and `save`.
        """
        with one_clear_line():
            return self._run(_as_pool(modelpool))

    def _run(self, pool: BaseModelPool) -> nn.Module | None:
        _save_checkpoints(pool)
        for path in filter(None, [self.model_path, getattr(self._program, "merged_model_save_path", None)]):
            if "{" not in path:  # the framework fills in its log folder later
                check_writable(Path(path))
        if self.model_path is not None and self._agreed(is_checkpoint(self.model_path)):
            log.info("loading the upscaled model from %s", self.model_path)
            with self.profile("load upscaled model"):
                return load(self.model_path, _load_unless_transformers(pool, self.model_path))
        model = self._upscale(pool)
        if model is not None and self.model_path is not None:
            with self.profile("save upscaled model"):
                save(model, self.model_path)
            if self._fabric_instance is not None:
                self.fabric.barrier()
        if _rank() == 0:
            log.info("%s", self.profiler.summary())
        return model

    def _agreed(self, answer: bool) -> bool:
        """Rank 0's answer: another rank may look when rank 0 has gone on already."""
        return self.fabric.broadcast(answer) if self._fabric_instance is not None else answer

    def _upscale(self, pool: BaseModelPool) -> nn.Module | None:
        if PRETRAINED not in pool.all_model_names:
            raise PlanError(f"the model pool has no {PRETRAINED!r} model; it has: {', '.join(pool.all_model_names)}")
        with self.profile("load pretrained model"):
            pretrained = load_model(pool, PRETRAINED)
        experts = {name: expert_of(pool, name, pretrained) for name in pool.model_names}
        if self.dry_run:
            if _rank() == 0:
                self._show_plan(pretrained, experts)
            return None
        store = FactorStore(self.factor_cache) if self.factor_cache else None
        with self.profile("upscale"), _Progress() as progress:
            model = upscale(
                pretrained,
                experts,
                self.options,
                store=store,
                share_work=self._fabric_instance is not None,
                in_place=not isinstance(pool._models[PRETRAINED], nn.Module),  # loaded for this alone
                calibration=self.calibration,
                on_item=progress.show,
            )
        if self.calibration:
            with self.profile("calibrate"):
                calibrate(model, calibration_inputs(pool, list(experts), self.calibration))
        before, after = section_of(model).recipe["parameters"]
        log.info("%d experts, %d parameters, parameter ratio %.3f", len(experts), after, after / before)
        return model

    def _show_plan(self, pretrained: nn.Module, experts: Mapping[str, Openable]) -> None:
        plan = plan_upscaling(pretrained, experts, self.options)
        table = Table(title="what smile_upscaling would do (dry_run=true)", show_header=False)
        for name, value in {**plan.summary(), **plan.budget(self.options)}.items():
            table.add_row(name, value)
        device = self.options.compute_device
        workers = plan.workers(device)
        seconds = estimated_seconds(plan, lambda noise, rank: truncated_svd(noise.to(device), rank), workers)
        table.add_row("time to factor, from files or memory", f"{seconds:.1f} s")
        Console().print(table)


class _Progress(ExitStack):
    """A bar that rank 0 shows from the first delta on: what is refused before is a line of its own."""

    _bar: tqdm | None = None

    def show(self, done: int, total: int) -> None:
        if self._bar is None:
            bar = tqdm(desc="factoring", unit="delta", total=total, disable=_rank() != 0, leave=False)
            self._bar = self.enter_context(bar)
        self._bar.update(done - self._bar.n)


def _rank() -> int:
    return getattr(rank_zero_only, "rank", 0)


def _as_pool(models: BaseModelPool | Mapping[str, nn.Module] | Sequence[nn.Module]) -> BaseModelPool:
    if isinstance(models, BaseModelPool):
        return models
    if isinstance(models, (Mapping, DictConfig)):
        return BaseModelPool(dict(models))
    return BaseModelPool({PRETRAINED if i == 0 else str(i - 1): model for i, model in enumerate(models)})


def _save_checkpoints(pool: BaseModelPool) -> None:
    """Have a pool that would pickle the tensors alone write checkpoints (`merged_model_save_path` goes through it)."""
    if type(pool).save_model is BaseModelPool.save_model:
        pool.save_model = lambda model, path, *_, **__: save(model, path)  # type: ignore[method-assign]


def _load_unless_transformers(pool: BaseModelPool, path: str) -> nn.Module | None:
    """The pretrained model, where the checkpoint at `path` needs it to be loaded into."""
    return None if (Path(path) / "config.json").exists() else load_model(pool, PRETRAINED)
