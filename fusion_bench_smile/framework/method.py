"""SMILE upscaling as a method of the framework: an adapter from a model pool to `upscale`."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

from fusion_bench.method.base_algorithm import BaseAlgorithm
from fusion_bench.mixins.lightning_fabric import LightningFabricMixin
from fusion_bench.mixins.simple_profiler import SimpleProfilerMixin
from fusion_bench.modelpool.base_pool import BaseModelPool
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn
from tqdm.auto import tqdm

from .. import construction
from ..config import FRAMEWORK_NAMES, FRAMEWORK_ONLY, SmileConfig, check_keys, with_own_names
from ..exceptions import PlanError
from ..io import ExpertSource, check_writable_folder, is_checkpoint, load, metadata_of, save
from .jobs import process_rank
from .model_pools import PRETRAINED, calibration_inputs, expert_source, is_adapter, load_model

log = logging.getLogger(__name__)
LIBRARY = __name__.partition(".")[0]

CONFIG_OPTIONS = [field.name for field in fields(SmileConfig)]
# task pool → the input that it gives to a model
NEEDED_INPUTS = {
    "CLIPVisionModelTaskPool": "pixel_values", "GlueTextTaskPool": "input_ids",
    "FlanT5GLUETextGenerationTaskPool": "input_ids",
}  # fmt: skip
RUN_OPTIONS = ["model_path", "factor_cache", "dry_run", "calibration"]
OPTIONS = [*CONFIG_OPTIONS, *RUN_OPTIONS]
FOREIGN_OPTIONS = {*FRAMEWORK_NAMES, *FRAMEWORK_ONLY}
DEFAULTS: dict[str, Any] = {**SmileConfig().to_dict(), "model_path": None}


class SmileUpscalingAlgorithm(LightningFabricMixin, SimpleProfilerMixin, BaseAlgorithm):
    """SMILE upscaling (arXiv 2408.10174, section 4) as a method of the framework.

    Args:
        model_path: folder of a checkpoint, which is loaded instead of upscaling; without a checkpoint, the upscaled
            model is saved there.
        factor_cache: folder of cached factors, which sweeps and restarted runs look up by the content of the weights.
        calibration: number of unlabelled inputs of each expert's training set for `calibrate`; zero-shot without.
        dry_run: print the plan and return None, which the framework neither saves nor evaluates.
        options: the fields of `SmileConfig`, named as in the framework's own SMILE, or in its methods for language
            models; see `FRAMEWORK_NAMES`.

    Raises:
        ConfigError: for an unknown option or an invalid value.
    """

    _config_mapping = BaseAlgorithm._config_mapping | {name: name for name in OPTIONS}

    def __init__(
        self, *, model_path: str | None = None, factor_cache: str | None = None, calibration: int = 0,
        dry_run: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        check_keys({name: v for name, v in options.items() if name not in FOREIGN_OPTIONS}, OPTIONS)
        for name in FRAMEWORK_ONLY.keys() & {name for name, value in options.items() if value}:
            log.warning("%s=%s has no effect: %s", name, options[name], FRAMEWORK_ONLY[name])
        options = with_own_names({**options, "model_path": model_path}, DEFAULTS)
        model_path = options.pop("model_path")
        plain = {name: OmegaConf.to_object(v) if OmegaConf.is_config(v) else v for name, v in options.items()}
        self.options = SmileConfig.from_dict(plain)
        construction.check_calibration(calibration, self.options)
        self.model_path, self.factor_cache = model_path, factor_cache
        self.calibration, self.dry_run = calibration, dry_run
        for name in CONFIG_OPTIONS:  # the framework builds `self.config` from attributes
            setattr(self, name, getattr(self.options, name))

    def run(self, modelpool: BaseModelPool | Mapping[str, nn.Module] | Sequence[nn.Module]) -> nn.Module | None:
        """Upscale a model pool, a mapping with the key ``_pretrained_``, or a sequence that starts with that model.

        Returns:
            The upscaled model on the device of the pretrained model; None for a dry run.

        Raises:
            SmileError: for models that can't be upscaled, loaded or saved; see `upscale`, `load` and `save`.
        """
        pool = _as_pool(modelpool)
        if process_rank() != 0:  # the others would say the same
            logging.getLogger(LIBRARY).setLevel(logging.WARNING)
        if type(pool).save_model is BaseModelPool.save_model:  # it pickles tensors; ``merged_model_save_path`` calls it
            pool.save_model = lambda model, path, *_, **__: save(model, path)  # type: ignore[method-assign]
        self._check_output_folders()
        if self.model_path is not None and self._on_all_ranks(is_checkpoint(self.model_path)):
            log.info("loading the upscaled model from %s", self.model_path)
            with self.profile("load upscaled model"):
                of_transformers = (Path(self.model_path) / "config.json").exists()  # others are loaded into a model
                return load(self.model_path, None if of_transformers else load_model(pool, PRETRAINED))
        # an error in one process, also while it loads or saves a model, ends the others
        with construction.WorkPartition(single_process=self._fabric_instance is None):
            model = self._upscale(pool)
            if model is not None and self.model_path is not None:
                with self.profile("save upscaled model"):
                    save(model, self.model_path)
        return model

    def _check_output_folders(self) -> None:
        """Refuse folders that can't be written before anything is computed."""
        for path in filter(None, [self.model_path, getattr(self._program, "merged_model_save_path", None)]):
            if "{" not in path:  # the framework fills in its log folder later
                check_writable_folder(Path(path))

    def _on_all_ranks(self, condition: bool) -> bool:
        """The condition as rank 0 found it: on another rank it may have changed by now."""
        return self.fabric.broadcast(condition) if self._fabric_instance is not None else condition

    def _upscale(self, pool: BaseModelPool) -> nn.Module | None:
        if PRETRAINED not in pool.all_model_names:
            raise PlanError(f"the model pool has no {PRETRAINED!r} model; it has: {', '.join(pool.all_model_names)}")
        with self.profile("load pretrained model"):
            pretrained = load_model(pool, PRETRAINED)
        check_task_pool(getattr(self._program, "taskpool", None), pretrained)
        experts = {name: expert_source(pool, name, pretrained) for name in pool.model_names}
        if adapters := sum(map(is_adapter, experts.values())):
            log.info("%d of %d experts are read as LoRA factors", adapters, len(experts))
        if self.calibration:  # data that can't be used are refused before anything is factored
            calibration_inputs(pool, list(experts), 1)
        if self.dry_run:
            if process_rank() == 0:
                self._print_plan(pretrained, experts)
            return None
        with self.profile("upscale"), _ProgressBar() as progress:
            model = construction.upscale(
                pretrained, experts, self.options, calibration=self.calibration, on_progress=progress.update,
                factor_cache=construction.FactorCache(self.factor_cache) if self.factor_cache else None,
                share_work=self._fabric_instance is not None,
                in_place=not isinstance(pool._models[PRETRAINED], nn.Module),  # loaded for this run alone
            )  # fmt: skip
        if self.calibration:
            with self.profile("calibrate"):
                construction.calibrate(model, calibration_inputs(pool, list(experts), self.calibration))
        before, after = metadata_of(model).provenance.parameters
        log.info("%d experts, %d parameters, parameter ratio %.3f", len(experts), after, after / before)
        return model

    def _print_plan(self, pretrained: nn.Module, experts: Mapping[str, ExpertSource]) -> None:
        plan = construction.plan_upscaling(pretrained, experts, self.options)
        Console().print(construction.plan_table(plan, self.options, "plan of smile_upscaling (dry_run=true)"))


def check_task_pool(taskpool: Any, model: nn.Module) -> None:
    """Raise PlanError if a task pool has images, and a model takes none, or likewise texts."""
    classes = [each.__name__ for each in type(taskpool).__mro__]
    needed = next((NEEDED_INPUTS[name] for name in classes if name in NEEDED_INPUTS), None)
    inputs = signature(model.forward).parameters.values()
    if needed is not None and all(each.name != needed and each.kind != each.VAR_KEYWORD for each in inputs):
        kind = "images" if needed == "pixel_values" else "texts"
        raise PlanError(
            f"the task pool {classes[0]} evaluates models of {kind}, and the model pool has a {type(model).__name__}: "
            "choose a task pool for it"
        )


class _ProgressBar(ExitStack):
    """A progress bar of rank 0, from the first factorized delta on: an error before that has a line to itself."""

    _bar: tqdm | None = None

    def update(self, done: int, total: int) -> None:
        if self._bar is None:
            bar = tqdm(desc="factorizing", unit="delta", total=total, disable=process_rank() != 0, leave=False)
            self._bar = self.enter_context(bar)
        self._bar.update(done - self._bar.n)


def _as_pool(models: BaseModelPool | Mapping[str, nn.Module] | Sequence[nn.Module]) -> BaseModelPool:
    if isinstance(models, BaseModelPool):
        return models
    if isinstance(models, (Mapping, DictConfig)):
        return BaseModelPool(dict(models))
    return BaseModelPool({PRETRAINED if i == 0 else str(i - 1): model for i, model in enumerate(models)})
