"""What an expert changed outside the routed layers: norms and embeddings that belong to it. Imports torch alone.

Where one decision for a whole input is known before its first layer (`scopes`, ``two_pass``), these too can be the
expert's. They are kept as they are, as differences to the pretrained ones: parameters ``expert_weight`` (T, …) and
``expert_bias`` (T, …) of the module they belong to, which a hook adds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .layers import Routed
from .scopes import InputRouter

ExpertParameters = Literal["layers", "norms", "all"]
PREFIX = "expert_"


def can_own(module: nn.Module, which: ExpertParameters) -> bool:
    """Whether an expert's own parameters of a module can be used: a norm's scale and shift, an embedding's rows."""
    if which == "all" and type(module) is nn.Embedding:
        return module.max_norm is None
    return which != "layers" and is_norm(module)


@torch.no_grad()
def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm over the last dimension: n(x)·weight + bias, with nothing else that is trained."""
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    if not parameters.keys() <= {"weight", "bias"} or weight is None or weight.ndim != 1 or weight.is_meta:
        return False
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return False
    x = torch.linspace(-1, 1, 2 * 3 * len(weight), device=weight.device, dtype=weight.dtype).view(2, 3, -1).sin()
    try:
        whole, plain = module(x), _without_affine(module, x)
    except (RuntimeError, ValueError, TypeError):
        return False
    again = plain * weight + parameters.get("bias", 0.0)
    return isinstance(whole, Tensor) and whole.shape == x.shape and torch.allclose(whole, again, atol=1e-2, rtol=1e-2)


def _without_affine(module: nn.Module, x: Tensor) -> Tensor:
    plain = {"weight": torch.ones_like(module.weight)}  # type: ignore[arg-type]
    if getattr(module, "bias", None) is not None:
        plain["bias"] = torch.zeros_like(module.bias)  # type: ignore[arg-type]
    return torch.func.functional_call(_Bare(module), {f"of.{name}": value for name, value in plain.items()}, (x,))


class _Bare(nn.Module):
    """A module's forward without its hooks."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        return self.of.forward(x)


def give(module: nn.Module, router: InputRouter, values: Mapping[str, Tensor]) -> None:
    """Have a module use the experts' own ``weight`` or ``bias``, given as differences (T, …), as `router` decides."""
    for name, value in values.items():
        module.register_parameter(PREFIX + name, nn.Parameter(value, requires_grad=False))
    hook = _Embedding(router) if isinstance(module, nn.Embedding) else _Norm(router)
    module.register_forward_hook(hook)


class _Norm:
    def __init__(self, router: InputRouter) -> None:
        self.router = router

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        weights = self.router.decided(len(out))
        if weights is None:
            return out
        scale, shift = (_chosen(module, name, weights, out) for name in ("weight", "bias"))
        out = out if scale is None else out + _without_affine(module, args[0]) * scale
        return out if shift is None else out + shift


class _Embedding:
    def __init__(self, router: InputRouter) -> None:
        self.router = router

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        inputs = self.router.inputs
        if inputs == 0 or self.router.decided(inputs) is None:
            return out
        rows = len(out) if len(out) % inputs == 0 else inputs  # positions are looked up once for all inputs
        weights = self.router.decided(rows)
        assert weights is not None
        ids, added = args[0].expand(rows, *args[0].shape[1:]), out.new_zeros(rows, *out.shape[1:])
        _, groups = self.router.groups(weights) or _every(weights)
        for expert, served in groups:
            mine = nn.functional.embedding(ids[served], module.expert_weight[expert])  # type: ignore[index]
            share = weights[served, expert].to(mine.dtype)
            added.index_add_(0, served, mine * share.view(-1, *[1] * (mine.ndim - 1)))
        return out + added


def _every(weights: Tensor) -> tuple[int, list[tuple[int, Tensor]]]:
    everyone = torch.arange(len(weights), device=weights.device)
    return len(weights), [(expert, everyone) for expert in range(weights.shape[1])]


def _chosen(module: nn.Module, name: str, weights: Tensor, out: Tensor) -> Tensor | None:
    """Each input's own difference (B, 1, …, D)."""
    own = getattr(module, PREFIX + name, None)
    if own is None:
        return None
    return (weights.to(own.dtype) @ own).view(len(out), *[1] * (out.ndim - 2), -1).to(out.dtype)


def own_names(model: nn.Module, which: ExpertParameters) -> dict[str, tuple[str, str]]:
    """Of the parameters that can be an expert's own: name in the state dict → module, parameter."""
    modules = {name: module for name, module in model.named_modules() if can_own(module, which)}
    return {f"{m}.{p}": (m, p) for m, module in modules.items() for p, _ in module.named_parameters(recurse=False)}


def owned(model: nn.Module) -> dict[str, list[str]]:
    """What experts own in a model: module → its parameters."""
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        mine = [p.removeprefix(PREFIX) for p in module._parameters if p in (f"{PREFIX}weight", f"{PREFIX}bias")]
        if mine and not isinstance(module, Routed):
            found[name] = mine
    return found


def disown(model: nn.Module) -> None:
    """Take the experts' own parameters away."""
    for name, parameters in owned(model).items():
        module = model.get_submodule(name)
        for parameter in parameters:
            del module._parameters[PREFIX + parameter]
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, (_Norm, _Embedding)):
                del module._forward_hooks[key]
