"""Upscale from files to files: for models that are larger than memory."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from .checkpoint import architecture, copy_companions, is_tied, make_section, replaced_folder, write_card
from .config import SmileConfig
from .errors import ConfigError, PlanError
from .parts import Base, Factorer, Job
from .plan import LayerPlan, Plan, check_expert, check_finite, make_plan
from .recipe import Recording
from .sources import INDEX, FilesSource, Openable, Source, tied_names
from .stack import Stack
from .storage import as_stored
from .store import FactorStore
from .upscale import open_all

log = logging.getLogger(__name__)


@torch.no_grad()
def upscale_to_folder(
    pretrained: str | os.PathLike[str],
    experts: Mapping[str, Openable],
    folder: str | os.PathLike[str],
    config: SmileConfig | None = None,
    *,
    store: FactorStore | None = None,
    max_shard_bytes: int = 2 * 10**9,
    **options: Any,
) -> None:
    """Write the upscaled checkpoint layer by layer, never holding more than one shard.

    Loading it with ``from_pretrained`` gives the model that `upscale` makes of the same models.

    Args:
        pretrained: a folder that ``save_pretrained`` wrote.
        experts: name → folder, PEFT LoRA adapter, or safetensors file.
        folder: where the checkpoint goes; complete, or not at all. An existing one is replaced.
        max_shard_bytes: a file is closed before it grows beyond this, unless one layer alone does.

    Raises:
        ConfigError, PlanError: as `upscale`; also for experts that can't be read tensor by tensor.
        CheckpointError: if nothing can be written to `folder`.
    """
    config = SmileConfig.given(config, options)
    _check_streams(config)
    pretrained = Path(pretrained)
    model = _skeleton(pretrained)
    plan = make_plan(model, len(experts), config)
    shapes = {name: tuple(shape) for name, shape in plan.tensors.items()}
    aliases = tied_names(model)
    base = FilesSource(pretrained, like=shapes, aliases=aliases)
    check_expert(plan, "_pretrained_", base.shapes())
    sources = open_all(plan, experts, base, aliases)
    for name, source in sources.items():
        if source is None:
            raise PlanError(f"expert {name!r} is no folder or file: upscaling to disk reads tensor by tensor")
    factorer = Factorer(config, with_router=len(experts) > 1, store=store, workers=plan.workers(config.compute_device))
    with replaced_folder(Path(folder)) as scratch:
        shards = _Shards(scratch, max_shard_bytes)
        layers: dict[str, dict[str, Any]] = {}
        recording = Recording(tuple(experts))
        opened = cast(Mapping[str, Source], sources)
        for name, tensor in _tensors(plan, model, base, opened, factorer, layers, recording):
            shards.add(name, tensor)
        shards.finish()
        copy_companions(pretrained, scratch)
        # read anew: the skeleton's own carries how the skeleton was made
        settings = AutoConfig.from_pretrained(pretrained)
        section = settings.quantization_config = make_section(layers, config, recording.recipe(plan.parameters))
        settings.save_pretrained(scratch)
        write_card(section, Path(folder), scratch, getattr(settings, "_name_or_path", ""))
    log.info("wrote %d upscaled layers into %s, %d files", len(layers), folder, len(shards.files))


def _check_streams(config: SmileConfig) -> None:
    """Refuse options that need the whole model, or all experts' spectra, at once."""
    held = {
        "param_ratio": config.param_ratio is not None,
        "expert_parameters": config.expert_parameters != "layers",
        "noise_baseline": config.noise_baseline,
    }
    for name in (name for name, is_set in held.items() if is_set):
        raise ConfigError(f"{name}={getattr(config, name)} needs the whole model in memory: use upscale and save")


def _skeleton(folder: Path) -> PreTrainedModel:
    """The model of a folder without its weights."""
    settings = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = architecture(folder, settings.architectures)._from_config(settings)
    model.tie_weights()
    return model


def _tensors(
    plan: Plan,
    model: PreTrainedModel,
    base: Source,
    experts: Mapping[str, Source],
    factorer: Factorer,
    layers: dict[str, dict[str, Any]],
    recording: Recording,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the upscaled checkpoint; fills `layers` with the layouts, and the recording."""
    tied = tied_names(model)

    def stored(name: str) -> str:
        """The one of a tied tensor's names that transformers expects in a checkpoint."""
        return next((n for n in (name, *tied.get(name, ())) if not is_tied(model, n)), name)

    for name in dict.fromkeys(stored(name) for name in plan.rest):
        yield name, _rest_tensor(name, base, experts, factorer.config)
    for layer in plan.layers:
        weight = _checked(base, f"{layer.name}.weight")
        bias = _checked(base, f"{layer.name}.bias") if layer.has_bias else None
        yield stored(f"{layer.name}.weight"), weight
        if bias is not None:
            yield f"{layer.name}.bias", bias
        start = Base.of(model.get_submodule(layer.name), weight, bias)
        yield from _routed(layer, start, experts, factorer, layers, recording)


def _routed(
    layer: LayerPlan,
    base: Base,
    experts: Mapping[str, Source],
    factorer: Factorer,
    layers: dict[str, dict[str, Any]],
    recording: Recording,
) -> Iterator[tuple[str, Tensor]]:
    jobs = [Job(layer, base, source, f"expert {name!r}") for name, source in experts.items()]
    stack = Stack(len(jobs), *factorer.parts(jobs))
    tensors = as_stored(stack.tensors(base.weight.device), factorer.config.storage)
    recording.add(layer.name, stack, tensors.values())
    if stack.changes_nothing:
        return
    layers[layer.name] = stack.layout(factorer.config).to_dict()
    for name, tensor in tensors.items():
        yield f"{layer.name}.{name}", tensor


def _checked(source: Source, name: str) -> Tensor:
    tensor = source.read(name)
    check_finite(tensor, name, "the pretrained model")
    return tensor


def _rest_tensor(name: str, base: Source, experts: Mapping[str, Source], config: SmileConfig) -> Tensor:
    tensor = _checked(base, name)
    total: Tensor | None = None
    for label, source in experts.items():
        if source.is_base(name) and not config.average_experts:
            continue
        value = source.read(name)
        check_finite(value, name, f"expert {label!r}")
        if config.average_experts and value.is_floating_point():
            value = value.to(torch.promote_types(value.dtype, torch.float32))
            total = value.clone() if total is None else total.add_(value)
    return tensor if total is None else (total / len(experts)).to(tensor.dtype)


class _Shards:
    """Writes tensors into files of bounded size; the index comes last, so that a part of a checkpoint never has one."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._pending: dict[str, Tensor] = {}
        self.files: list[tuple[Path, list[str]]] = []
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._pending and sum(t.nbytes for t in self._pending.values()) + tensor.nbytes > self._max_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._total += tensor.nbytes

    def _flush(self) -> None:
        file = self._folder / f"part-{len(self.files) + 1}.safetensors"
        save_file(self._pending, file, {"format": "pt"})
        self.files.append((file, list(self._pending)))
        self._pending = {}

    def finish(self) -> None:
        self._flush()
        count = len(self.files)
        weight_map: dict[str, str] = {}
        for number, (file, names) in enumerate(self.files, 1):
            target = f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
            file.rename(self._folder / target)
            weight_map |= dict.fromkeys(names, target)
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            (self._folder / INDEX).write_text(json.dumps(index, indent=1))
