"""What an expert changed outside the routed layers: norms and embeddings that belong to it. Imports torch alone.

Where one decision for a whole input is known before its first layer (`scopes`, ``two_pass``), these too can be the
expert's. They are kept as they are, as differences (T, …) to the pretrained ones, by the router; hooks add them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .scopes import InputRouter

ExpertParameters = Literal["layers", "norms", "all"]


def can_own(name: str, module: nn.Module, which: ExpertParameters) -> bool:
    """Whether an expert's own parameters of a module can be used: a norm's scale and shift, an embedding's rows.

    Relative positions are those of pairs of tokens, looked up once for all inputs: they stay the pretrained ones.
    """
    if which == "all" and type(module) is nn.Embedding:
        return module.max_norm is None and "relative" not in name
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


def give(model: nn.Module, router: InputRouter, own: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Have modules use what experts own, module → parameter → differences (T, …), as `router` decides."""
    for name, values in own.items():
        for parameter, value in values.items():
            router.own[_key(name, parameter)] = nn.Parameter(value, requires_grad=False)
        module = model.get_submodule(name)
        kind = _Embedding if isinstance(module, nn.Embedding) else _Norm
        module.register_forward_hook(kind(router, name))


def _key(module: str, parameter: str) -> str:
    return f"{module}/{parameter}".replace(".", "/")  # a dot would be a submodule


class _Own:
    """A hook of one module."""

    def __init__(self, router: InputRouter, name: str) -> None:
        self.router, self.name = router, name

    def difference(self, parameter: str) -> Tensor | None:
        """Of all experts: (T, …)."""
        key = _key(self.name, parameter)
        return self.router.own.get(key, None)


class _Norm(_Own):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        weights = self.router.decided(len(out))
        if weights is None:
            return out
        scale, shift = (self._chosen(parameter, weights, out) for parameter in ("weight", "bias"))
        out = out if scale is None else out + _without_affine(module, args[0]) * scale
        return out if shift is None else out + shift

    def _chosen(self, parameter: str, weights: Tensor, out: Tensor) -> Tensor | None:
        """Each input's own difference (B, 1, …, D)."""
        own = self.difference(parameter)
        if own is None:
            return None
        return (weights.to(own) @ own).view(len(out), *[1] * (out.ndim - 2), -1).to(out.dtype)


class _Embedding(_Own):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        inputs = self.router.inputs
        if inputs == 0 or self.router.decided(inputs) is None:
            return out
        rows = len(out) if len(out) % inputs == 0 else inputs  # positions are looked up once for all inputs
        weights, own = self.router.decided(rows), self.difference("weight")
        assert weights is not None
        assert own is not None
        ids, added = args[0].expand(rows, *args[0].shape[1:]), out.new_zeros(rows, *out.shape[1:])
        _, groups = self.router.groups(weights) or _every(weights)
        for expert, served in groups:
            mine = nn.functional.embedding(ids[served], own[expert])
            share = weights[served, expert].to(mine.dtype)
            added.index_add_(0, served, mine * share.view(-1, *[1] * (mine.ndim - 1)))
        return out + added


def _every(weights: Tensor) -> tuple[int, list[tuple[int, Tensor]]]:
    everyone = torch.arange(len(weights), device=weights.device)
    return len(weights), [(expert, everyone) for expert in range(weights.shape[1])]


def own_names(model: nn.Module, which: ExpertParameters) -> dict[str, tuple[str, str]]:
    """Of the parameters that can be an expert's own: name in the state dict → module, parameter."""
    modules = {name: module for name, module in model.named_modules() if can_own(name, module, which)}
    return {f"{m}.{p}": (m, p) for m, module in modules.items() for p, _ in module.named_parameters(recurse=False)}


def owned(model: nn.Module) -> dict[str, list[str]]:
    """What experts own in a model: module → its parameters."""
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        for hook in (hook for hook in module._forward_hooks.values() if isinstance(hook, _Own)):
            found[name] = [p for p in ("weight", "bias") if hook.difference(p) is not None]
    return found


def disown(model: nn.Module) -> None:
    """Have no module use what experts own."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, _Own):
                del module._forward_hooks[key]
