"""Streaming upscaling, from files to files: for models that are larger than memory."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from ..config import SmileConfig
from ..exceptions import ConfigError, PlanError
from ..io import ExpertSource, Provenance, SmileMetadata, Source, StateDictSource, stored_names, tied_names
from ..io.atomic import replace_folder_atomically
from ..io.checkpoint import architecture, copy_companions, is_companion
from ..io.model_card import write_model_card
from ..io.names import check_expert_names
from ..io.safetensors_source import INDEX_FILE
from ..io.sources import with_names_of
from ..io.text import shortened
from ..io.transformers_hook import SmileQuantizationConfig, is_tied, mark_checkpoint
from ..io.weight_files import open_weights
from ..nn import ExpertLayout, store_tensors
from ..nn.attention import split_names
from .bounds import expert_bounds
from .changes import (
    TensorChanges,
    check_averages,
    check_recurrent,
    expert_changes,
    read_changes,
    read_finite,
    warn_of_unused_changes,
)
from .factor_cache import FactorCache
from .factorize import Factorizer, ProgressCallback, add_to_sum, average, open_experts
from .layer_factors import LayerFactors
from .layer_selection import split_targeted_attention
from .plan import LayerPlan, Plan, check_expert, make_plan

log = logging.getLogger(__name__)


@torch.no_grad()
def upscale_to_folder(
    pretrained: str | os.PathLike[str], experts: Mapping[str, ExpertSource], folder: str | os.PathLike[str],
    config: SmileConfig | None = None, *,
    factor_cache: FactorCache | None = None, max_shard_bytes: int = 2 * 10**9,
    on_progress: ProgressCallback | None = None, **options: Any,
) -> None:  # fmt: skip
    """Write an upscaled checkpoint layer by layer, holding no more than one shard in memory.

    Loading it with ``from_pretrained`` gives the model that `upscale` makes of the same models.

    Args:
        pretrained: A folder that ``save_pretrained`` wrote.
        experts: Name → folder, PEFT LoRA adapter, or safetensors file.
        folder: The folder of the checkpoint, complete or absent. An existing one is replaced.
        config: The options; alternatively they are given as keywords.
        factor_cache: A cache of factors. None factors everything.
        max_shard_bytes: A file is closed before it grows beyond this, unless one tensor alone does.
        on_progress: Called after each layer with the number of layers done and in all.
        options: The fields of `SmileConfig`.

    Raises:
        ConfigError, PlanError: As for `upscale`; also for experts that cannot be read tensor by tensor.
        CheckpointError: Nothing can be written to `folder`.
    """
    config, pretrained, folder = SmileConfig.resolve(config, options), Path(pretrained), Path(folder)
    stream = _Stream(pretrained, experts, config, factor_cache, on_progress)
    with replace_folder_atomically(folder, carry=is_companion) as scratch:
        writer = ShardWriter(scratch, max_shard_bytes)
        for name, tensor in stream.tensors():
            writer.add(name, tensor)
        writer.finish()
        copy_companions(pretrained, scratch)
        metadata = stream.metadata()
        model_config = AutoConfig.from_pretrained(pretrained)  # not the meta model's, which records how it was made
        model_config.quantization_config = SmileQuantizationConfig(metadata)
        model_config.save_pretrained(scratch)
        mark_checkpoint(scratch, metadata, tied_names(stream.model))
        write_model_card(metadata, folder, scratch, getattr(model_config, "_name_or_path", ""))
    warn_of_unused_changes(metadata.provenance)
    log.info("wrote %d upscaled layers to %s, %d files", len(metadata.layouts), folder, writer.num_files)


def plan_folder(pretrained: Path, experts: Mapping[str, ExpertSource], config: SmileConfig) -> Plan:
    """The plan of `upscale_to_folder`, from the headers of all files. Raises ConfigError and PlanError as it does."""
    stream = _Stream(pretrained, experts, config)
    layers = [layer.name for layer in stream.plan.layers]
    return replace(stream.plan, experts=tuple(expert_bounds(source, layers) for source in stream.experts.values()))


class _Stream:
    """The tensors of an upscaled checkpoint, one after the other, and its metadata at the end."""

    def __init__(
        self, folder: Path, experts: Mapping[str, ExpertSource], config: SmileConfig,
        factor_cache: FactorCache | None = None, on_progress: ProgressCallback | None = None,
    ) -> None:  # fmt: skip
        """Plan the upscaling with a model without weights, and open all files."""
        self.on_progress = on_progress
        check_expert_names(experts)
        for name in ("param_ratio", "byte_ratio"):
            if (value := getattr(config, name)) is not None:
                raise ConfigError(f"{name}={value} needs the whole model in memory: use upscale and save")
        try:
            model_config = AutoConfig.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise PlanError(f"{folder} has no config of a transformers model: {shortened(error)}") from None
        with torch.device("meta"):
            self.model = architecture(folder, model_config.architectures)._from_config(model_config)
        self.model.tie_weights()
        self.model = split_targeted_attention(self.model, config)
        self.plan, self.aliases = make_plan(self.model, len(experts), config), stored_names(self.model)
        shapes = {name: tuple(shape) for name, shape in self.plan.tensors.items()}
        files = open_weights(folder, like=shapes, aliases=self.aliases)
        self.pretrained = with_names_of(shapes, files, self.aliases)
        check_expert(self.plan, "_pretrained_", self.pretrained.shapes())
        sources = open_experts(self.plan, experts, self.pretrained, self.aliases)
        if loaded := [name for name, source in sources.items() if source is None]:
            raise PlanError(f"expert {loaded[0]!r} is no folder or file: upscaling to disk reads tensor by tensor")
        self.experts = cast("dict[str, Source]", sources)
        workers = self.plan.num_workers(config.compute_device)
        self.factorizer = Factorizer(config, len(experts) > 1, factor_cache, workers)
        self.layouts: dict[str, ExpertLayout] = {}
        self.energy: dict[str, list[float]] = {}
        self.digests: list[list[str]] = []
        self.changes: dict[str, TensorChanges] = {}
        self.added_parameters = 0

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of everything that the checkpoint holds."""

        def stored_name(name: str) -> str:
            """The name of a tied tensor that transformers expects in a checkpoint."""
            return next((n for n in (name, *self.aliases.get(name, ())) if not is_tied(self.model, n)), name)

        for name, expert in self.experts.items():
            self._read_outside_layers(name, expert)
        for name in dict.fromkeys(stored_name(name) for name in self.plan.other_tensors):
            yield name, self._other_tensor(name)
        for done, layer in enumerate(self.plan.layers, 1):
            names = [f"{layer.name}.{part}" for part in (("weight", "bias") if layer.has_bias else ("weight",))]
            state = {name: read_finite(self.pretrained, name, "the pretrained model") for name in names}
            for name, tensor in state.items():
                yield stored_name(name) if name.endswith(".weight") else name, tensor
            yield from self._expert_tensors(layer, StateDictSource(state))
            if self.on_progress:
                self.on_progress(done, len(self.plan.layers))

    def _read_outside_layers(self, name: str, expert: Source) -> None:
        label, changes = f"expert {name!r}", TensorChanges()
        if self.factorizer.config.average_experts:
            check_averages(self.plan, self.pretrained, expert, label, self.aliases)
        else:
            changes = read_changes(self.plan, self.pretrained, expert, label, self.aliases)
        self.changes[name] = changes

    def _expert_tensors(self, layer: LayerPlan, pretrained: Source) -> Iterator[tuple[str, Tensor]]:
        items = [(layer, source, f"expert {name!r}") for name, source in self.experts.items()]
        factors = LayerFactors(len(items), self.factorizer.factorize(pretrained, items))
        self.digests.append([expert.source_digest for expert in factors.experts])
        for name, expert in zip(self.experts, factors.experts, strict=True):
            self.changes[name].used[f"{layer.name}.weight"] = expert.squared_norm
        if factors.is_unchanged:
            return
        config = self.factorizer.config
        self.layouts[layer.name] = factors.layout(config.routing_use_diff)
        self.energy[layer.name] = [expert.energy for expert in factors.experts]
        device = pretrained.read(f"{layer.name}.weight").device
        tensors = factors.tensors(device)
        for name, tensor in store_tensors(tensors, config.storage).items():
            self.added_parameters += tensors.get(name, tensor).numel()
            yield f"{layer.name}.{name}", tensor

    def _other_tensor(self, name: str) -> Tensor:
        tensor = read_finite(self.pretrained, name, "the pretrained model")
        total: Tensor | None = None
        for expert, source in self.experts.items() if self.factorizer.config.average_experts else ():
            value = read_finite(source, name, f"expert {expert!r}")
            total = add_to_sum(total, value) if value.is_floating_point() else total
        return tensor if total is None else average(total, len(self.experts), name, tensor.dtype)

    def metadata(self) -> SmileMetadata:
        """The metadata of the checkpoint, once all tensors were taken."""
        parameters = (self.plan.parameters, self.plan.parameters + self.added_parameters)
        provenance = Provenance.of_layers(tuple(self.experts), self.energy, self.digests, parameters)
        check_recurrent(self.plan, self.changes)
        provenance = replace(provenance, changes=expert_changes(self.changes))
        split = tuple(split_names(self.model))
        config, experts = self.factorizer.config, tuple(self.experts)
        return SmileMetadata(config, experts, self.layouts, provenance, split_attention=split)


class ShardWriter:
    """Writes tensors to safetensors files of bounded size. The index comes last: a partial checkpoint has none."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._pending: dict[str, Tensor] = {}
        self._files: list[tuple[Path, list[str]]] = []
        self._total_bytes = self.num_files = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, at the latest with the last one."""
        if self._pending and sum(t.nbytes for t in self._pending.values()) + tensor.nbytes > self._max_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._total_bytes += tensor.nbytes

    def _flush(self) -> None:
        self.num_files += 1
        file = self._folder / f"part-{self.num_files}.safetensors"
        save_file(self._pending, file, {"format": "pt"})
        self._files.append((file, list(self._pending)))
        self._pending = {}

    def finish(self) -> None:
        """Write the remaining tensors and the index."""
        self._flush()
        weight_map: dict[str, str] = {}
        for number, (file, names) in enumerate(self._files, 1):
            part = f"-{number:05d}-of-{self.num_files:05d}" if self.num_files > 1 else ""
            file.rename(self._folder / f"model{part}.safetensors")
            weight_map |= dict.fromkeys(names, f"model{part}.safetensors")
        if self.num_files > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=1))
