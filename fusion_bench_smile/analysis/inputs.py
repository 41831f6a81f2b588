"""What a task pool gives to a model: caught from its own evaluation, so that a study needs no loader of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SmileError


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, model: nn.Module) -> Any:
        with torch.no_grad():
            return model(*self.args, **self.kwargs)

    @property
    def mask(self) -> Tensor | None:
        """Which tokens are no padding: (batch, tokens), if the model was told."""
        mask = self.kwargs.get("attention_mask")
        return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def real(self, values: Tensor) -> Tensor:
        """Which tokens of a layer's values (…, n) in this call are no padding: (…), all where the mask doesn't fit."""
        mask = self.mask
        if mask is None or mask.shape != values.shape[:-1]:
            return torch.ones(values.shape[:-1], dtype=torch.bool, device=values.device)
        return mask.to(values.device)


class _Enough(Exception):  # noqa: N818  # ends an evaluation, is no error
    pass


def caught(model: nn.Module, evaluate: Callable[[nn.Module], Any], calls: int) -> list[Call]:
    """The first calls of `model` in its evaluation, which ends there.

    Args:
        evaluate: e.g. the ``evaluate`` of a task pool with one task.
        calls: how many at most.

    Raises:
        SmileError: if the model is never called.
    """
    found: list[Call] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(Call(args, dict(kwargs)))
        if len(found) >= calls:
            raise _Enough

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        evaluate(model)
    except _Enough:
        pass
    finally:
        handle.remove()
    if not found:
        raise SmileError("the task pool didn't call the model: this study needs one that does")
    return found


@contextmanager
def outputs_of(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the outputs (…, hidden) of some modules inside the ``with`` block, one entry for each call."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}

    def collect(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen[name].append((output[0] if isinstance(output, tuple) else output).detach())

        return hook

    handles = [module.register_forward_hook(collect(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that follow each other: the members of its `nn.ModuleList`s that hold linear layers.

    Lists within such a layer are left out.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{block}.") for block in found)
        if isinstance(module, nn.ModuleList) and not inside:
            members = [(f"{name}.{number}", member) for number, member in enumerate(module)]
            found |= {n: m for n, m in members if any(isinstance(part, nn.Linear) for part in m.modules())}
    return found
