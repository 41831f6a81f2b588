"""Upscaling: from a pretrained model and its experts to one routed model."""

import logging
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import psutil
import torch
from torch import nn

from ..config import SmileConfig
from ..exceptions import PlanError
from ..io import ExpertSource, Provenance, StateDictSource, stored_names
from ..io.metadata import describe_model
from ..io.names import check_expert_names
from ..io.transformers_hook import attach_metadata
from ..nn import Prototypes, num_scored
from ..nn.attention import split_in_place, split_names
from .agreement import check_same_options
from .assemble import replace_layers, set_averages, set_routing
from .bounds import expert_bounds
from .changes import check_recurrent, expert_changes, warn_of_unused_changes
from .factor_cache import FactorCache
from .factorize import FactorizedExperts, Factorizer, ProgressCallback, factorize_experts, open_experts
from .layer_selection import split_targeted_attention
from .parallel import WorkPartition
from .plan import Plan, allocate_ranks, make_plan
from .rank_allocation import summarize_ranks

log = logging.getLogger(__name__)

CAUSAL_LM_SUFFIXES = ("ForCausalLM", "LMHeadModel")  # of classes of transformers

Experts = Mapping[str, ExpertSource] | Sequence[ExpertSource]


@torch.no_grad()
def upscale(
    pretrained: nn.Module, experts: Experts, config: SmileConfig | None = None, *,
    factor_cache: FactorCache | None = None, share_work: bool = False, in_place: bool = False, calibration: int = 0,
    on_progress: ProgressCallback | None = None, **options: Any,
) -> nn.Module:  # fmt: skip
    """Upscale a pretrained model and its experts into one routed model (arXiv 2408.10174, section 4).

    Upscaling needs no data and no training. Every linear layer that an expert changed becomes a routed layer. The other
    parameters stay the pretrained ones, or are averaged with ``average_experts``. The result is a model of the same
    class, on the devices and in the dtypes of the pretrained model.

    Args:
        pretrained: The pretrained model. It is copied, not modified, unless `in_place` is set.
        experts: Name → fine-tuned model; those of a sequence are called "0", "1", …. An expert is a module, a state
            dict, a folder with safetensors files (read tensor by tensor), a PEFT LoRA adapter (never merged), or a
            function that loads one of these: it is called once, and its result is dropped before the next one's call.
        config: The options; alternatively they are given as keywords (``k=16``).
        factor_cache: A cache of factors. None factors everything.
        share_work: Divide the work among the processes of torch.distributed's default group. All of them must call this
            function with the same models and options, which is checked, and all get the same model. An error in one of
            them is raised in all.
        in_place: Build in `pretrained` itself, which saves a copy. Invalid arguments are refused before it is modified.
        calibration: Reserve room in a budget for `calibrate` with so many inputs of each task.
        on_progress: Called after each (expert, layer) pair with the number of pairs done and in all, by this process.
        options: The fields of `SmileConfig`.

    Raises:
        ConfigError: An option cannot work.
        PlanError: The models cannot be upscaled together; see `make_plan` and `check_expert`.
    """
    with WorkPartition(single_process=not share_work) as partition:
        config, named = SmileConfig.resolve(config, options), _named(experts)
        if meta := [name for name, parameter in pretrained.named_parameters() if parameter.is_meta]:
            raise PlanError(f"the pretrained model has no weights, {meta[0]} is on the meta device: load it first")
        return _upscale(
            pretrained, named, config, calibration, partition, factor_cache=factor_cache, in_place=in_place,
            on_progress=on_progress,
        )  # fmt: skip


def _upscale(
    given: nn.Module, named: dict[str, ExpertSource], config: SmileConfig, calibration: int,
    partition: WorkPartition, *,
    factor_cache: FactorCache | None, in_place: bool, on_progress: ProgressCallback | None,
) -> nn.Module:  # fmt: skip
    pretrained = split_targeted_attention(given, config)
    plan = make_plan(pretrained, len(named), config)
    began, workers = time.perf_counter(), plan.num_workers(config.compute_device)
    factorizer = Factorizer(config, with_router=len(named) > 1, cache=factor_cache, workers=workers)
    factorized = FactorizedExperts()
    check_same_options(partition, config, calibration, named)
    factorize_experts(plan, pretrained, named, factorizer, partition, factorized, on_progress)
    changes = factorized.gather_changes(named, partition)
    check_recurrent(plan, changes)
    model = split_in_place(given, split_names(pretrained)) if in_place else deepcopy(pretrained)
    layers_of = partition
    if config.has_budget:
        scored = num_scored(len(plan.layers))
        reserved = Prototypes.num_parameters(plan.num_experts, scored, calibration) if calibration else 0
        fit_ranks(plan, factorized, partition, config, reserved)
        layers_of = WorkPartition()  # every process has the factors of all
    provenance = replace_layers(model, plan, factorized, layers_of, config, tuple(named))
    provenance = replace(provenance, changes=expert_changes(changes))
    set_averages(model, partition.all_gather(factorized.sums)[0], len(named))
    set_routing(model, config, tuple(named))
    attach_metadata(model, describe_model(model, config, tuple(named), provenance))
    _log_summary(plan, factorizer, provenance, time.perf_counter() - began)
    if config.routing_scope == "token" and len(named) > 1 and type(model).__name__.endswith(CAUSAL_LM_SUFFIXES):
        log.warning(
            "routing_scope=token chooses by the last token, which is alike in many prompts, where a language model "
            "answers; routing_scope=input with top_k=2 chooses by the whole prompt (docs/routing.md)"
        )
    return model


def plan_upscaling(pretrained: nn.Module, experts: Experts, config: SmileConfig | None = None, **options: Any) -> Plan:
    """The plan of `upscale` with the same arguments. Whatever is refused without reading weights is refused.

    Raises:
        ConfigError, PlanError: See `upscale`.
    """
    config, named = SmileConfig.resolve(config, options), _named(experts)
    pretrained = split_targeted_attention(pretrained, config)
    plan = make_plan(pretrained, len(named), config)
    opened = open_experts(plan, named, StateDictSource(pretrained.state_dict()), stored_names(pretrained))
    layers = [layer.name for layer in plan.layers]
    return replace(plan, experts=tuple(expert_bounds(source, layers) for source in opened.values()))


def _named(experts: Experts) -> dict[str, ExpertSource]:
    named = dict(experts) if isinstance(experts, Mapping) else {str(i): expert for i, expert in enumerate(experts)}
    check_expert_names(named)
    return named


def fit_ranks(
    plan: Plan, factorized: FactorizedExperts, partition: WorkPartition, config: SmileConfig, reserved: int
) -> None:  # fmt: skip
    """Gather the factors of all layers in every process, and truncate them to the ranks within the budget.

    Raises ConfigError if the budget without the `reserved` parameters is too small for the router rows.
    """
    spectra = []
    for layer in plan.layers:
        factors = factorized.layers[layer.name] = factorized.gather_layer(layer.name, plan.num_experts, partition)
        gate_ranks = [expert.gate_rank for expert in factors.experts]
        energies = factors.squared_singular_values()
        spectra.append(layer.spectra(energies, gate_ranks, factors.num_bias_parameters, config))
    ranks = allocate_ranks(plan, spectra, config, reserved)
    log.info("ranks: %s", "; ".join(f"{kind} {text}" for kind, text in summarize_ranks(spectra, ranks).items()))
    for layer, layer_ranks in zip(plan.layers, ranks, strict=True):
        factors = factorized.layers[layer.name]
        factorized.layers[layer.name] = factors.truncate(layer_ranks, config.routing_use_diff)


def _log_summary(plan: Plan, factorizer: Factorizer, provenance: Provenance, seconds: float) -> None:
    log.info("upscaled %d of %d linear layers in %.1f s", len(provenance.energy), len(plan.layers), seconds)
    memory = psutil.Process().memory_info().rss
    log.info("read %.1f MB of the experts; this process holds %.0f MB", factorizer.bytes_read / 1e6, memory / 1e6)
    shares = torch.tensor([share for layer in provenance.energy.values() for share in layer])
    if len(shares):
        log.info("energy ‖ΔW‖² kept by the ranks: min %.4f, median %.4f", shares.min(), shares.median())
    if factorizer.cache is not None and factorizer.cache.hits + factorizer.cache.misses:  # LoRA experts need none
        log.info("factor cache: %d hits, %d misses", factorizer.cache.hits, factorizer.cache.misses)
    warn_of_unused_changes(provenance)
