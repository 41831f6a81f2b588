"""Plan → factors → layers: from a pretrained model and its experts to one routed model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .checkpoint import describe
from .config import SmileConfig
from .errors import ConfigError
from .factors import truncated_svd
from .layers import DENSE, SmileLayout, SmileLinear
from .plan import LayerPlan, check_expert, make_plan

log = logging.getLogger(__name__)

Expert = nn.Module | Callable[[], nn.Module]
Experts = Mapping[str, Expert] | Sequence[Expert]


@dataclass(frozen=True)
class ExpertPart:
    """What one expert adds to one layer; every tensor in the pretrained layer's dtype and device, None if not needed.

    Shapes: down (rows, in), up (out, rank), gate (gate_rank, in), dense (out, in), bias (out,).
    """

    rank: int
    gate_rank: int
    down: Tensor | None = None
    up: Tensor | None = None
    gate: Tensor | None = None
    dense: Tensor | None = None
    bias: Tensor | None = None

    @property
    def changes_nothing(self) -> bool:
        return self.rank == 0 and self.bias is None


@torch.no_grad()
def upscale(
    pretrained: nn.Module,
    experts: Experts,
    config: SmileConfig | None = None,
    *,
    on_expert: Callable[[str], None] | None = None,
    **options: Any,
) -> nn.Module:
    """Upscale a pretrained model and its experts into one routed model (arXiv 2408.10174, section 4).

    Needs no data and no training. Every linear layer that an expert changed becomes a `SmileLinear`; the others, and
    all other parameters, stay the pretrained ones (or are averaged, with ``average_experts``).

    Args:
        pretrained: the common ancestor. It is copied, never modified.
        experts: name → fine-tuned model; a sequence gets the names "0", "1", …. A value may also be a function that
            loads the model: it is called once, and the model is dropped before the next one is loaded.
        config: the options; alternatively give them as keywords (``k=16``).
        on_expert: called with each expert's name after it has been taken in (progress).

    Returns:
        A new model of the same class, on the pretrained model's devices and in its dtypes.

    Raises:
        ConfigError: for an option that can't work.
        PlanError: for models that can't be upscaled together; see `make_plan` and `check_expert`.
    """
    if config is not None and options:
        raise ConfigError(f"give either config or keywords, not both (got {', '.join(options)})")
    config = config or SmileConfig.from_dict(options)
    named = dict(experts) if isinstance(experts, Mapping) else {str(i): e for i, e in enumerate(experts)}
    plan = make_plan(pretrained, len(named), config)
    layers = {layer.name: cast(nn.Linear, pretrained.get_submodule(layer.name)) for layer in plan.layers}
    parts: dict[str, list[ExpertPart]] = {layer.name: [] for layer in plan.layers}
    sums: dict[str, Tensor] = {}
    for name, expert in named.items():
        model = expert if isinstance(expert, nn.Module) else expert()
        check_expert(plan, name, model)
        for layer in plan.layers:
            tuned = cast(nn.Linear, model.get_submodule(layer.name))
            parts[layer.name].append(_expert_part(layers[layer.name], tuned, layer, config, len(named)))
        if config.average_experts:
            _accumulate(sums, plan.rest, model)
        del model
        if on_expert:
            on_expert(name)
    upscaled = deepcopy(pretrained)
    _replace_layers(upscaled, parts, config)
    _set_averages(upscaled, sums, len(named))
    describe(upscaled, config, tuple(named))
    return upscaled


def _expert_part(
    base: nn.Linear, tuned: nn.Linear, layer: LayerPlan, config: SmileConfig, num_experts: int
) -> ExpertPart:
    weight, device = base.weight, config.compute_device
    work = torch.promote_types(torch.promote_types(weight.dtype, tuned.weight.dtype), torch.float32)
    tuned_weight = tuned.weight.to(device, work)
    delta = tuned_weight - weight.to(device, work)
    changed = bool(delta.any())

    def stored(tensor: Tensor) -> Tensor:
        return tensor.to(weight.device, weight.dtype)

    bias = None
    if base.bias is not None and not torch.equal(base.bias, tuned.bias.to(base.bias.device, base.bias.dtype)):
        bias = stored(tuned.bias.to(device, work) - base.bias.to(device, work))
    gate_k = layer.gate_k if num_experts > 1 else 0  # a single expert needs no router
    gate_rank, gate = 0, None
    if gate_k and not config.routing_use_diff:
        router = truncated_svd(tuned_weight, gate_k)
        gate_rank, gate = router.rank, stored(router.down)
    if not changed:
        return ExpertPart(rank=0, gate_rank=gate_rank, gate=gate, bias=bias)
    needed = max(layer.k, gate_k if config.routing_use_diff else 0)
    factors = truncated_svd(delta, needed) if needed > 0 else None
    if factors and config.routing_use_diff:
        gate_rank = min(gate_k, factors.rank)
    if layer.k == DENSE:
        down = stored(factors.down[:gate_rank]) if factors else None
        return ExpertPart(DENSE, gate_rank, down=down, gate=gate, dense=stored(delta), bias=bias)
    assert factors is not None  # k is at least 1 here
    rank = min(layer.k, factors.rank)
    return ExpertPart(rank, gate_rank, stored(factors.down), stored(factors.up[:, :rank]), gate, bias=bias)


def _replace_layers(model: nn.Module, parts: dict[str, list[ExpertPart]], config: SmileConfig) -> None:
    replaced: dict[nn.Module, SmileLinear] = {}
    for name, layer_parts in parts.items():
        if not all(part.changes_nothing for part in layer_parts):
            layer = cast(nn.Linear, model.get_submodule(name))
            replaced[layer] = _build_layer(layer, layer_parts, config)
    log.info("upscaled %d of %d linear layers", len(replaced), len(parts))
    for name, module in list(model.named_modules(remove_duplicate=False)):  # a module may be reached by several names
        if module in replaced:
            model.set_submodule(name, replaced[module])


def _build_layer(base: nn.Linear, parts: list[ExpertPart], config: SmileConfig) -> SmileLinear:
    layout = SmileLayout(
        ranks=tuple(part.rank for part in parts),
        gate_ranks=tuple(part.gate_rank for part in parts),
        top_k=config.top_k,
        shared_router=config.routing_use_diff,
        expert_bias=any(part.bias is not None for part in parts),
    )
    layer = SmileLinear(base.in_features, base.out_features, base.bias is not None, layout, device="meta")
    layer.weight, layer.bias = base.weight, base.bias
    values = {
        "down": _joined([part.down for part in parts], dim=0),
        "up": _joined([part.up for part in parts], dim=1),
        "gate": _joined([part.gate for part in parts], dim=0),
        "dense": _joined([part.dense[None] for part in parts if part.dense is not None], dim=0),
    }
    if layout.expert_bias:
        none = base.weight.new_zeros(base.out_features)
        values["expert_bias"] = torch.stack([none if part.bias is None else part.bias for part in parts])
    for name, value in values.items():
        assert (value is None) == (getattr(layer, name) is None), name
        if value is not None:
            setattr(layer, name, nn.Parameter(value, requires_grad=base.weight.requires_grad))
    return layer.train(base.training)


def _joined(tensors: Sequence[Tensor | None], dim: int) -> Tensor | None:
    present = [t for t in tensors if t is not None and t.numel()]
    return torch.cat(present, dim=dim).contiguous() if present else None


def _accumulate(sums: dict[str, Tensor], names: tuple[str, ...], expert: nn.Module) -> None:
    state = expert.state_dict()
    for name in names:
        if state[name].is_floating_point():
            value = state[name].to(torch.promote_types(state[name].dtype, torch.float32))
            sums[name] = value.clone() if name not in sums else sums[name].add_(value)


def _set_averages(model: nn.Module, sums: dict[str, Tensor], count: int) -> None:
    state = model.state_dict()  # its tensors share storage with the model's
    for name, total in sums.items():
        state[name].copy_(total / count)
