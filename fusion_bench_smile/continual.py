"""Add an expert to an upscaled model, or take one away, as if it had been built so from the start."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from .checkpoint import describe, section_of
from .config import SmileConfig
from .errors import PlanError
from .kin import plain_kind
from .layers import DENSE, Routed
from .own import disown
from .parts import ExpertPart, Factorer
from .plan import make_plan
from .recipe import Recipe
from .scopes import detach
from .sharing import Share
from .sources import Openable
from .stack import Stack
from .upscale import Taken, put_router, replace_layers, take_in

Parts = dict[str, list[ExpertPart]]


@torch.no_grad()
def add_expert(model: nn.Module, expert: Openable, name: str) -> nn.Module:
    """A new model with one expert more; only that one is factored.

    Args:
        model: what `upscale` returned, or what was loaded from its checkpoint. It is not modified.
        expert: as for `upscale`.
        name: its name, which no other expert has.

    Raises:
        PlanError: for an expert that doesn't fit, a name that is taken, or a model that can't be extended: its other
            parameters are averages, or it was built with one expert, and so without a router that could be completed.
        CheckpointError: if `model` was not made by `upscale`.
    """
    names, config, known = _recorded(model)
    if name in names:
        raise PlanError(f"there is an expert {name!r} already; the experts are: {', '.join(names)}")
    pretrained, parts = taken_apart(model, known)
    plan = make_plan(pretrained, len(names) + 1, config)
    if len(names) == 1:
        parts = {layer: [_with_router(part, config, layer)] for layer, (part,) in parts.items()}
    unchanged = [ExpertPart(rank=0, gate_rank=0)] * len(names)
    taken = Taken({layer.name: Stack(len(names) + 1, *parts.get(layer.name, unchanged)) for layer in plan.layers})
    factorer = Factorer(config, with_router=True, workers=plan.workers(config.compute_device))
    take_in(plan, pretrained, {name: expert}, factorer, Share(), taken)
    recipe = replace_layers(pretrained, plan, taken, Share(), config, (*names, name))
    recipe.sources |= known.sources
    put_router(pretrained, config, len(recipe.sources))
    describe(pretrained, config, recipe)
    return pretrained


@torch.no_grad()
def remove_expert(model: nn.Module, name: str) -> nn.Module:
    """A new model without one of its experts.

    Args:
        model: what `upscale` returned, or what was loaded from its checkpoint. It is not modified.
        name: the expert's.

    Raises:
        PlanError: for an unknown name, the last expert, or a model whose other parameters are averages.
        ConfigError: if fewer experts than `top_k` would be left.
        CheckpointError: if `model` was not made by `upscale`.
    """
    names, config, known = _recorded(model)
    if name not in names:
        raise PlanError(f"there is no expert {name!r}; the experts are: {', '.join(names)}")
    left = [number for number, other in enumerate(names) if other != name]
    pretrained, parts = taken_apart(model, known)
    plan = make_plan(pretrained, len(left), config)
    taken = Taken()
    for layer, of_layer in parts.items():
        kept = [of_layer[number] for number in left]
        kept = kept if len(kept) > 1 else [_without_router(kept[0], config)]
        taken.stacks[layer] = Stack(len(left), *kept)
    others = [names[number] for number in left]
    recipe = replace_layers(pretrained, plan, taken, Share(), config, others)
    recipe.sources |= {other: known.sources[other] for other in others if other in known.sources}
    put_router(pretrained, config, len(recipe.sources))
    describe(pretrained, config, recipe)
    return pretrained


def _recorded(model: nn.Module) -> tuple[list[str], SmileConfig, Recipe]:
    section = section_of(model)
    config = SmileConfig.recorded(section.options)
    fixed = {
        "param_ratio": config.param_ratio is not None,
        "expert_parameters": config.expert_parameters != "layers",
        "calibration": section.router.get("prototypes") is not None,
        "noise_baseline": config.noise_baseline,
    }
    for name in (name for name, is_set in fixed.items() if is_set):
        raise PlanError(
            f"the experts of a model with {name} can't be changed, it is made for all of them: build it anew"
        )
    if config.average_experts:
        raise PlanError("the experts of a model with average_experts=true can't be changed: build it anew")
    return section.experts, config, Recipe.from_dict(section.recipe)


def taken_apart(model: nn.Module, recipe: Recipe) -> tuple[nn.Module, Parts]:
    """A copy of the pretrained model inside an upscaled one, and the experts' parts of its routed layers."""
    model = deepcopy(model)
    detach(model)
    disown(model)
    plain: dict[nn.Module, nn.Module] = {}
    parts = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, Routed):
            if module not in plain:
                plain[module] = module.without_experts(cast(type[nn.Module], plain_kind(module)))
            found = parts_of(module)
            kept = recipe.energy.get(name, [part.energy for part in found])
            parts[name] = [replace(part, energy=energy) for part, energy in zip(found, kept, strict=True)]
            model.set_submodule(name, plain[module])
    return model, parts


def parts_of(layer: Routed) -> list[ExpertPart]:
    """What each expert adds to a routed layer."""
    layout = layer.layout
    found = []
    for number, rank in enumerate(layout.ranks):
        bias = None if layer.expert_bias is None else layer.expert_bias[number]
        dense = layer.rows("dense", layout.dense_rows, number)
        found.append(
            ExpertPart(
                rank=rank,
                gate_rank=layout.gate_ranks[number],
                gate=layer.rows("gate", layout.gate_ranks, number),
                down=layer.rows("down", layout.down_rows, number),
                up=layer.rows("up", layout.low_ranks, number),
                dense=None if dense is None else dense[0],
                bias=bias if bias is not None and bool(bias.any()) else None,
            )
        )
    return found


def directions(part: ExpertPart, shared: int) -> Tensor | None:
    """All rank directions of a part whose first `shared` ones are router rows."""
    rows = [part.gate[:shared]] if part.gate is not None and shared else []
    rows += [part.down] if part.down is not None else []
    return torch.cat(rows) if rows else None


def _without_router(part: ExpertPart, config: SmileConfig) -> ExpertPart:
    shared = min(max(part.rank, 0), part.gate_rank) if config.routing_use_diff else 0
    return replace(part, gate_rank=0, gate=None, down=directions(part, shared))


def _with_router(part: ExpertPart, config: SmileConfig, layer: str) -> ExpertPart:
    """A single expert's part, with the router it would have had beside others."""
    complete = 0 <= part.rank < config.k  # there are no more directions than these
    if not config.routing_use_diff or part.rank == DENSE or (part.rank < config.gate_k and not complete):
        raise PlanError(
            f"{layer} was built for one expert and lacks the {config.gate_k} directions that its router needs beside "
            "others: build the model anew with both experts"
        )
    gate_rank = min(config.gate_k, part.rank)
    down = part.down
    return replace(
        part,
        gate_rank=gate_rank,
        gate=None if down is None else down[:gate_rank],
        down=None if down is None else down[gate_rank:],
    )
