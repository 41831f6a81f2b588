"""The layers to upscale: which the options name, and which routing can serve."""

import difflib
import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import nn

from ..config import SmileConfig
from ..exceptions import ConfigError, PlanError
from ..nn import plain_type_of
from ..nn.attention import SplitMultiheadAttention, split_attention, splittable
from ..nn.compatibility import has_other_parametrization, model_problem, read_layers, scope_problem

ALL_LINEAR = "all-linear"  # as in PEFT: all linear layers but the output head
SAME_AS_PLAIN = ("FalconLinear",)  # subclasses whose own forward computes what that of the plain layer does
FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # read the weights of their layers in fused kernels


def candidate_layers(model: nn.Module, config: SmileConfig) -> dict[str, nn.Module]:
    """Every layer of a type that the options allow. The weight of a grouped convolution is not a single matrix."""
    layers = {name: module for name, module in model.named_modules() if plain_type_of(module)}
    return {n: m for n, m in layers.items() if not isinstance(m, nn.Conv2d) or (config.convolutions and m.groups == 1)}


def select_layers(model: nn.Module, candidates: dict[str, nn.Module], config: SmileConfig) -> dict[str, nn.Module]:
    """The candidates that `target_modules` and `exclude_modules` leave, in the order of the model.

    Raises:
        ConfigError: A pattern matches no candidate.
        PlanError: No layer is left, or routing can't serve the model, the routing scope, or a layer.
    """
    targeted = _targeted(model, config)
    selected = {name: layer for name, layer in candidates.items() if name in targeted}
    if not selected:
        raise PlanError(_nothing_to_upscale(model, len(candidates), config))
    if problem := model_problem(model):
        raise PlanError(problem)
    for name, layer in selected.items():
        _check_layer(model, name, layer)
    if read := read_layers(model, selected):
        raise PlanError(_refusal(f"{type(model).__name__} reads the weight of {read[0]}", read, selected))
    if config.routing_scope != "token" and (problem := scope_problem(model, list(selected))):
        raise ConfigError(f"routing_scope={config.routing_scope}: {problem}, or use routing_scope=token")
    return selected


def split_targeted_attention(model: nn.Module, config: SmileConfig) -> nn.Module:
    """A model with the same parameters and split attention where the options name a layer of it.

    Without such attention it is the model itself. Raises ConfigError for a pattern that matches no layer.
    """
    owners = {layer.rpartition(".")[0] for layer in _targeted(model, config)}
    return split_attention(model, owners.intersection(splittable(model)))


def _targeted(model: nn.Module, config: SmileConfig) -> set[str]:
    """The names of the candidates, with those that splitting attention gives, that the options leave."""
    candidates = candidate_layers(split_attention(model), config)
    targeted = set(candidates)
    if config.target_modules is not None:
        targeted = matching_layers(model, config.target_modules, candidates)
    return targeted - matching_layers(model, config.exclude_modules, candidates)


def matching_layers(model: nn.Module, patterns: Iterable[str], names: Collection[str]) -> set[str]:
    """The names that match one of some patterns, which are read as PEFT reads ``target_modules``.

    A pattern is the end of a name (``q_proj``, ``0.fc1``), or else a pattern with wildcards for the whole name
    (``vision_model.*``), or else a regular expression for the whole name. ``all-linear`` stands for all layers but the
    output head. Raises ConfigError if a pattern matches nothing.
    """
    matched: set[str] = set()
    for pattern in patterns:
        found = _matches(model, pattern, names)
        if not found:
            hint = _hint(pattern, names)
            raise ConfigError(f"the module pattern {pattern!r} matches no linear layer of this model{hint}")
        matched |= found
    return matched


def _matches(model: nn.Module, pattern: str, names: Collection[str]) -> set[str]:
    if pattern == ALL_LINEAR:
        head = cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        heads = {name for name, module in model.named_modules() if module is head}
        return set(names) - heads
    if ends := {name for name in names if f".{name}".endswith(f".{pattern}")}:
        return ends
    if whole := {name for name in names if fnmatchcase(name, pattern)}:
        return whole
    try:
        return {name for name in names if re.fullmatch(pattern, name)}
    except re.error:
        return set()


def _hint(pattern: str, names: Collection[str]) -> str:
    """The nearest of the last parts of the names, and the first of these."""
    last = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    near = difflib.get_close_matches(re.split(r"[.*]+", pattern)[-1], last, n=1)
    question = f" (did you mean {near[0]!r}?)" if near else ""
    return f"{question}; its layers are called {', '.join(last[:8])}{', …' if len(last) > 8 else ''}" if last else ""


def _check_layer(model: nn.Module, name: str, module: nn.Module) -> None:
    plain = cast("type[nn.Module]", plain_type_of(module))
    if has_other_parametrization(module):
        raise PlanError(
            f"the weight of {name} is computed from other parameters, by weight norm or another parametrization: "
            f"remove that first, or leave it out with exclude_modules=['{name}']"
        )
    if type(module).forward is not plain.forward and type(module).__name__ not in SAME_AS_PLAIN:
        raise PlanError(
            f"{name} is a {type(module).__name__}, which computes more than {plain.__name__} does; "
            f"leave it out with exclude_modules=['{name}'], or start from a model with plain layers"
        )
    parts = name.split(".")
    for parent in (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))):
        if isinstance(parent, FUSED) and not isinstance(parent, SplitMultiheadAttention):
            raise PlanError(_refusal(f"torch.nn.{type(parent).__name__} reads the weight of {name}", [name], [name]))


def _refusal(problem: str, names: list[str], others: Collection[str]) -> str:
    """Why layers can't be upscaled, and the option that leaves them out, by ends of names if these suffice."""
    last = {name.rpartition(".")[2] for name in names}
    alike = [name for name in others if name.rpartition(".")[2] in last]
    excluded = sorted(last) if len(alike) == len(names) > 1 else names
    return f"{problem} without calling it, so its experts would be ignored; leave it out: exclude_modules={excluded}"


def _nothing_to_upscale(model: nn.Module, count: int, config: SmileConfig) -> str:
    if count:
        return f"target_modules and exclude_modules leave none of the {count} linear layers of {type(model).__name__}"
    has_convolutions = any(isinstance(module, nn.Conv2d) for module in model.modules())
    hint = "; convolutions=true upscales its convolutions" if has_convolutions and not config.convolutions else ""
    return f"{type(model).__name__} has no linear layer to upscale{hint}"
