"""Plan → factors → layers: from a pretrained model and its experts to one routed model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .budget import LayerSpectra, describe_ranks
from .checkpoint import describe
from .config import SmileConfig
from .errors import PlanError
from .kin import routed_class
from .layers import Routed, SmileLayout
from .noise import measure_baseline
from .own import give, own_names
from .parts import Base, Factorer, Job
from .plan import Plan, allocate_within, check_expert, check_finite, make_plan
from .prototypes import Prototypes
from .recipe import Recipe, Recording
from .scopes import InputRouter
from .sharing import Share
from .sources import Openable, Source, StateSource, open_source, tied_names
from .stack import Stack
from .storage import as_stored
from .store import FactorStore

log = logging.getLogger(__name__)

Experts = Mapping[str, Openable] | Sequence[Openable]
OnItem = Callable[[int, int], None]


@torch.no_grad()
def upscale(
    pretrained: nn.Module,
    experts: Experts,
    config: SmileConfig | None = None,
    *,
    store: FactorStore | None = None,
    share_work: bool = False,
    in_place: bool = False,
    calibration: int = 0,
    on_item: OnItem | None = None,
    **options: Any,
) -> nn.Module:
    """Upscale a pretrained model and its experts into one routed model (arXiv 2408.10174, section 4).

    Needs no data and no training. Every linear layer that an expert changed becomes a routed one; the others, and
    all other parameters, stay the pretrained ones (or are averaged, with ``average_experts``).

    Args:
        pretrained: the common ancestor. It is copied, not modified, unless `in_place` is set.
        experts: name → fine-tuned model; a sequence gets the names "0", "1", …. Each is a module, a state dict, a
            folder with safetensors files (read tensor by tensor) or a PEFT LoRA adapter (never merged), or a function
            that loads one of these: it is called once, and what it loaded is dropped before the next one is loaded.
        config: the options; alternatively give them as keywords (``k=16``).
        store: where factors are kept and looked up; None factors everything.
        share_work: divide the work among the processes of torch.distributed's default group. All of them must call
            this with the same models, and all get the same model.
        in_place: build in `pretrained` itself, for a caller who has no other use for it. What is refused, is refused
            before it is touched.
        calibration: of a `param_ratio`, leave what `calibrate` will need if it is given so many inputs of each task.
        on_item: called after each (expert, layer) pair that this process has factored, with how many it has done and
            how many it has to do.

    Returns:
        A model of the same class, on the pretrained model's devices and in its dtypes; a new one, unless `in_place`.

    Raises:
        ConfigError: for an option that can't work.
        PlanError: for models that can't be upscaled together; see `make_plan` and `check_expert`.
    """
    config, named = SmileConfig.given(config, options), _named(experts)
    plan = make_plan(pretrained, len(named), config)
    began, share = time.perf_counter(), Share(alone=not share_work)
    factorer = Factorer(config, with_router=len(named) > 1, store=store, workers=plan.workers(config.compute_device))
    taken, error = Taken(), None
    try:
        take_in(plan, pretrained, named, factorer, share, taken, on_item)
    except Exception as problem:
        error = problem
    share.agree(error)
    upscaled = pretrained if in_place else deepcopy(pretrained)
    own = own_differences(pretrained, share.exchange(taken.own)[0], len(named))
    if config.param_ratio is not None:
        later = Prototypes.parameters_for(len(named), len(plan.layers), calibration) if calibration else 0
        fit_ranks(plan, pretrained, taken, share, config, _number(own, len(named), config) + later)
        share = Share()
    recipe = replace_layers(upscaled, plan, taken, share, config, tuple(named))
    _set_averages(upscaled, share.exchange(taken.sums)[0], len(named))
    put_router(upscaled, config, len(named), own)
    before, after = recipe.parameters
    recipe.parameters = (before, after + _number(own, len(named), config))
    describe(upscaled, config, recipe)
    _log_summary(plan, taken, factorer, recipe, time.perf_counter() - began)
    return upscaled


def _named(experts: Experts) -> dict[str, Openable]:
    return dict(experts) if isinstance(experts, Mapping) else {str(i): expert for i, expert in enumerate(experts)}


@dataclass
class Taken:
    """What was taken in of all experts.

    Attributes:
        stacks: layer → what the experts add to it, in their order.
        own: tensor that can be an expert's own → number of the expert that changed it → by how much.
        sums: of the tensors to be averaged.
        differing: names of tensors in no upscaled layer that some expert changed.
    """

    stacks: dict[str, Stack] = field(default_factory=dict)
    own: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    differing: set[str] = field(default_factory=set)


def take_in(
    plan: Plan,
    pretrained: nn.Module,
    experts: Mapping[str, Openable],
    factorer: Factorer,
    share: Share,
    taken: Taken,
    on_item: OnItem | None = None,
) -> None:
    """Factor this process's share of the (expert, layer) pairs, and look at the experts' other tensors."""
    base = StateSource(pretrained.state_dict())
    aliases = tied_names(pretrained)
    opened = open_all(plan, experts, base, aliases)
    modules = {layer.name: cast(nn.Linear, pretrained.get_submodule(layer.name)) for layer in plan.layers}
    bases = {name: Base.of(module, module.weight, module.bias) for name, module in modules.items()}
    takes = share.takes([layer.work for _ in experts for layer in plan.layers])
    turns, done = iter(takes), 0
    own = own_names(pretrained, factorer.config.expert_parameters)
    for number, (name, expert) in enumerate(experts.items()):
        mine = [layer for layer, is_mine in zip(plan.layers, turns, strict=False) if is_mine]
        averages = factorer.config.average_experts and share.rank == 0  # one process adds up, in a fixed order
        owns = own.keys() if share.rank == 0 else ()
        if not mine and not averages and not owns:
            continue
        source = opened.pop(name)  # dropped, with what it has mapped, when the next one is begun
        if source is None:
            source = open_source(cast(Callable[[], Any], expert)(), base, aliases)
            assert source is not None, f"the function for expert {name!r} returned no model"
            check_expert(plan, name, source.shapes())
        jobs = [Job(layer, bases[layer.name], source, f"expert {name!r}") for layer in mine]
        for layer, part in zip(mine, factorer.parts(jobs), strict=True):
            taken.stacks.setdefault(layer.name, Stack(plan.num_experts)).add(part)
            done += 1
            if on_item:
                on_item(done, sum(takes))
        _take_rest(plan, base, source, f"expert {name!r}", taken, averages)
        for tensor in (tensor for tensor in owns if tensor in plan.rest and not source.is_base(tensor)):
            start = base.read(tensor)
            difference = source.read(tensor).to(start) - start
            if difference.any():
                taken.own.setdefault(tensor, {})[number] = difference


def open_all(
    plan: Plan, experts: Mapping[str, Openable], base: Source, aliases: Mapping[str, tuple[str, ...]]
) -> dict[str, Source | None]:
    """Open every expert that can be without loading it; what can be refused is, before the first factor is computed."""
    opened = {}
    for name, expert in experts.items():
        try:
            opened[name] = open_source(expert, base, aliases)
        except PlanError as error:
            raise PlanError(f"expert {name!r}: {error}") from None
    for name, source in opened.items():
        if source is not None:
            check_expert(plan, name, source.shapes())
    return opened


def plan_upscaling(pretrained: nn.Module, experts: Experts, config: SmileConfig | None = None, **options: Any) -> Plan:
    """What `upscale` with the same arguments would do; refuses what that would refuse without reading any weight.

    Raises:
        ConfigError, PlanError: see `upscale`.
    """
    config, named = SmileConfig.given(config, options), _named(experts)
    plan = make_plan(pretrained, len(named), config)
    open_all(plan, named, StateSource(pretrained.state_dict()), tied_names(pretrained))
    return plan


def _take_rest(plan: Plan, base: Source, source: Source, label: str, taken: Taken, averages: bool) -> None:
    """Look at an expert's tensors in no upscaled layer: are they finite, were they changed, what is their sum."""
    for name in plan.rest:
        if source.is_base(name) and not averages:
            continue
        tensor = source.read(name)
        check_finite(tensor, name, label)
        if not averages and not torch.equal(tensor, base.read(name).to(tensor.device, tensor.dtype)):
            taken.differing.add(name)
        if averages and tensor.is_floating_point():
            value = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            taken.sums[name] = value.clone() if name not in taken.sums else taken.sums[name].add_(value)


def replace_layers(
    model: nn.Module, plan: Plan, taken: Taken, share: Share, config: SmileConfig, experts: Sequence[str]
) -> Recipe:
    """Put the routed layers into `model`; returns what they were made of."""
    replaced: dict[nn.Module, Routed] = {}
    recording = Recording(experts)
    for planned in plan.layers:
        layer = model.get_submodule(planned.name)
        stack, *others = share.exchange(taken.stacks.pop(planned.name, Stack(plan.num_experts)))
        for other in others:
            stack.extend(other)
        tensors = as_stored(stack.tensors(cast(Tensor, layer.weight).device), config.storage)
        recording.add(planned.name, stack, tensors.values())
        if not stack.changes_nothing:
            replaced[layer] = build_layer(layer, stack.layout(config), tensors)
    for name, module in list(model.named_modules(remove_duplicate=False)):  # a module may be reached by several names
        if module in replaced:
            model.set_submodule(name, replaced[module])
    return recording.recipe(plan.parameters)


def build_layer(base: nn.Module, layout: SmileLayout, tensors: Mapping[str, Tensor]) -> Routed:
    """A routed layer around the pretrained one."""
    layer = routed_class(base).around(base, layout, device="meta")
    for name, value in tensors.items():
        trained = layer.weight.requires_grad and value.is_floating_point()
        setattr(layer, name, nn.Parameter(value, requires_grad=trained))
    return layer


def own_differences(
    model: nn.Module, found: Mapping[str, Mapping[int, Tensor]], experts: int
) -> dict[str, dict[str, Tensor]]:
    """What experts own: module → parameter → by how much each changed it, (T, …)."""
    own: dict[str, dict[str, Tensor]] = {}
    for name, changes in found.items():
        module, _, parameter = name.rpartition(".")
        some = cast(Tensor, getattr(model.get_submodule(module), parameter))
        rows = [changes[number] if number in changes else torch.zeros_like(some) for number in range(experts)]
        own.setdefault(module, {})[parameter] = torch.stack([row.to(some.device) for row in rows])
    return own


def put_router(
    model: nn.Module, config: SmileConfig, experts: int, own: Mapping[str, Mapping[str, Tensor]] | None = None
) -> None:
    """Give an upscaled model what decides for whole inputs, unless every token is decided for."""
    if config.routing_scope == "token":
        return
    router = InputRouter(config.routing_scope, experts, config.top_k, config.refuse_unknown)
    router.attach(model)
    if config.noise_baseline:
        router.set_baseline(measure_baseline(model, router))
    give(model, router, own or {})


def fit_ranks(
    plan: Plan, pretrained: nn.Module, taken: Taken, share: Share, config: SmileConfig, reserved: int
) -> None:
    """Put stacks of all experts, with the ranks that the budget allows, into `taken`.

    Args:
        reserved: parameters that are needed beside the layers.

    Raises:
        ConfigError: if the budget is too small for the router rows; it names the largest `gate_k` that fits.
    """
    assert config.param_ratio is not None
    shared, spectra = config.routing_use_diff, []
    for planned in plan.layers:
        stack, *others = share.exchange(taken.stacks.pop(planned.name, Stack(plan.num_experts)))
        for other in others:
            stack.extend(other)
        taken.stacks[planned.name] = stack
        weight = cast(Tensor, pretrained.get_submodule(planned.name).weight)
        spectra.append(
            LayerSpectra(
                planned.name,
                planned.in_features,
                planned.out_features,
                stack.energies_of_directions(),
                tuple(stack.gate_ranks),
                shared,
                float(weight.double().square().sum()),
                stack.bias_parameters,
                int(config.storage == "int8"),
            )
        )
    ranks = allocate_within(spectra, plan.parameters, config, reserved)
    told = "; ".join(f"{kind} {span}" for kind, span in describe_ranks(spectra, ranks).items())
    log.info("ranks by allocation=%s: %s", config.allocation, told)
    for planned, of_layer in zip(plan.layers, ranks, strict=True):
        taken.stacks[planned.name] = taken.stacks[planned.name].truncated(of_layer, shared)


def _number(own: Mapping[str, Mapping[str, Tensor]], experts: int, config: SmileConfig) -> int:
    """Parameters of the result beside its layers."""
    return sum(value.numel() for values in own.values() for value in values.values()) + (
        2 * experts if config.noise_baseline else 0
    )


def _set_averages(model: nn.Module, sums: Mapping[str, Tensor], count: int) -> None:
    state = model.state_dict()  # its tensors share storage with the model's
    for name, total in sums.items():
        state[name].copy_(total / count)


def _log_summary(plan: Plan, taken: Taken, factorer: Factorer, recipe: Recipe, seconds: float) -> None:
    log.info("upscaled %d of %d linear layers, in %.1f s", len(recipe.energy), len(plan.layers), seconds)
    log.info("read %.1f MB of the experts; peak memory of this process %s", factorer.bytes_read / 1e6, peak_memory())
    kept = torch.tensor([energy for values in recipe.energy.values() for energy in values])
    if len(kept):
        log.info("energy ‖ΔW‖² kept by the ranks: min %.4f, median %.4f", kept.min(), kept.median())
    if factorer.store is not None:
        log.info("factor store: %d found, %d factored", factorer.store.hits, factorer.store.misses)
    if taken.differing:
        first = sorted(taken.differing)[0]
        log.info(
            "%d tensors outside the upscaled layers differ from the pretrained model's and are not used (first: %s); "
            "average_experts=true averages them",
            len(taken.differing), first,
        )  # fmt: skip


def peak_memory() -> str:
    """The largest resident size of this process so far, as text."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: unlike getrusage's, its peak begins with this program
        return f"{int(status.read_text().split('VmHWM:')[1].split()[0]) * 1024 / 1e6:.0f} MB"
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return "unknown"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6:.0f} MB"
