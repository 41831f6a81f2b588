"""The upscaled models that are compared, and the parameters that they need beside those that they have."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fusion_bench_smile import FactorCache, upscale
from fusion_bench_smile.construction import set_routing
from fusion_bench_smile.nn import Prototypes, layers_with_router, merged_parameters, routed_layers
from studies.routing.benchmarks import Benchmark
from studies.routing.variants import RankOptions, Variant

Experts = Mapping[str, nn.Module]


def build_model(
    benchmark: Benchmark, experts: Experts, ranks: RankOptions, variant: Variant, factor_cache: FactorCache | None
) -> nn.Module:
    """An upscaled model with the ranks of a budget and the routing of a variant; it is not calibrated."""
    config = ranks.config(benchmark.expert_set, variant)
    return upscale(benchmark.pretrained(), dict(experts), config, factor_cache=factor_cache).eval()


def change_routing(model: nn.Module, benchmark: Benchmark, ranks: RankOptions, variant: Variant) -> None:
    """Route an upscaled model by another variant that needs the same factors; cheaper than `build_model`."""
    set_routing(model, ranks.config(benchmark.expert_set, variant), benchmark.tasks)


def extra_parameters(benchmark: Benchmark, variant: Variant, model: nn.Module) -> int:
    """The number of parameters that a variant needs for prototypes or a noise baseline, which the model lacks."""
    num_tasks = len(benchmark.tasks)
    if variant.calibration:
        return Prototypes.num_parameters(num_tasks, len(layers_with_router(model)), variant.calibration)
    return 2 * num_tasks if variant.noise_baseline else 0


@torch.no_grad()
def merge_experts(pretrained: nn.Module, upscaled: nn.Module, scaling: float) -> nn.Module:
    """W₀ + scaling · Σᵢ ΔWᵢ in every routed layer.

    Args:
        pretrained: The pretrained model; it is modified.
        upscaled: An upscaled model with the experts.
        scaling: Factor of the sum.
    """
    for name, layer in routed_layers(upscaled).items():
        plain = pretrained.get_submodule(name)
        merged = [merged_parameters(layer, expert) for expert in range(layer.layout.num_experts)]
        for parameter, values in zip(("weight", "bias"), zip(*merged, strict=True), strict=True):
            value = getattr(plain, parameter)
            if value is not None:
                value += scaling * (torch.stack(values) - value).sum(0)
    return pretrained
