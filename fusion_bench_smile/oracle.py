"""Serve every input with one expert, for whoever knows the task: what routing could reach at best."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .checkpoint import section_of
from .errors import ConfigError, PlanError
from .scopes import ROUTER, InputRouter


@contextmanager
def as_expert(model: nn.Module, name: str) -> Iterator[None]:
    """Inside the ``with`` block, serve every input with one expert, for whoever knows the task; nothing is scored.

    Raises:
        ConfigError: for a model whose tokens are routed each on its own (``routing_scope="token"``).
        PlanError: if there is no such expert.
    """
    names, router = section_of(model).experts, getattr(model, ROUTER, None)
    if not isinstance(router, InputRouter):
        raise ConfigError("one expert for whole inputs needs another routing_scope than token, e.g. two_pass")
    if name not in names:
        raise PlanError(f"there is no expert {name!r}; the experts are: {', '.join(names)}")
    weights = torch.eye(len(names), device=next(model.parameters()).device)
    before, router.forced = router.forced, weights[names.index(name)]
    try:
        yield
    finally:
        router.forced = before
