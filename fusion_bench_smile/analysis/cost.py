"""What upscaling costs, measured: construction, parameters and the forward pass against experts and ranks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..sources import Openable
from ..upscale import upscale
from .inputs import Call

Point = tuple[int, int, int]  # experts, gate_k, k


def costs(
    pretrained: nn.Module,
    experts: Mapping[str, Openable],
    points: Sequence[Point],
    call: Call,
    repeats: int = 5,
) -> pd.DataFrame:
    """Build and run upscaled models.

    Args:
        points: number of experts (the first ones), gate_k and k of each model.
        call: what the forward pass is measured on.
        repeats: of each forward pass; the plain model takes turns with the upscaled one, and medians are compared.

    Returns:
        One row for each point: ``experts``, ``gate_k``, ``k``, ``construction`` (seconds, without a factor store),
        ``parameters`` and ``flops`` and ``forward`` (relative to the pretrained model's).
    """
    plain_flops = _flops(pretrained, call)
    plain_parameters = _parameters(pretrained)
    rows = []
    for count, gate_k, k in points:
        chosen = dict(list(experts.items())[:count])
        construction, model = _timed(lambda: upscale(pretrained, chosen, gate_k=gate_k, k=k))  # noqa: B023
        call(model.eval())
        times = [(_timed(lambda: call(pretrained))[0], _timed(lambda: call(model))[0]) for _ in range(repeats)]  # noqa: B023
        plain, routed = (statistics.median(column) for column in zip(*times, strict=True))
        rows.append(
            {
                "experts": count,
                "gate_k": gate_k,
                "k": k,
                "construction": construction,
                "parameters": _parameters(model) / plain_parameters,
                "flops": _flops(model, call) / plain_flops,
                "forward": routed / plain,
            }
        )
    return pd.DataFrame(rows)


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def _flops(model: nn.Module, call: Call) -> int:
    with FlopCounterMode(display=False) as counter:
        call(model)
    return counter.get_total_flops()


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
