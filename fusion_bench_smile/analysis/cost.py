"""What upscaling costs, measured: construction, parameters and the forward pass against experts and ranks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..sources import Openable
from ..surroundings import Meter
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
        One row for each point: ``experts``, ``gate_k``, ``k``; ``construction`` (seconds, without a factor store) and
        ``construction_memory`` (peak beyond what was held, MB; None where the system can't tell); ``parameters``,
        ``flops`` and ``forward`` (time), relative to the pretrained model's; ``forward_memory`` (MB).
    """
    plain_flops = _flops(pretrained, call)
    plain_parameters = parameters_of(pretrained)
    rows = []
    for count, gate_k, k in points:
        chosen = dict(list(experts.items())[:count])
        meter = Meter()
        model = upscale(pretrained, chosen, gate_k=gate_k, k=k).eval()
        construction = meter.stop()
        meter = Meter()
        call(model)
        first = meter.stop()
        times = [(_seconds(call, pretrained), _seconds(call, model)) for _ in range(repeats)]
        plain, routed = (statistics.median(column) for column in zip(*times, strict=True))
        rows.append(
            {
                "experts": count,
                "gate_k": gate_k,
                "k": k,
                "construction": construction.seconds,
                "construction_memory": construction.peak_megabytes,
                "parameters": parameters_of(model) / plain_parameters,
                "flops": _flops(model, call) / plain_flops,
                "forward": routed / plain,
                "forward_memory": first.peak_megabytes,
            }
        )
    return pd.DataFrame(rows)


def _seconds(call: Call, model: nn.Module) -> float:
    began = time.perf_counter()
    call(model)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _flops(model: nn.Module, call: Call) -> int:
    # the counter doesn't know the product that is added in place
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _added_product}) as counter:
        call(model)
    return counter.get_total_flops()


def _added_product(_: torch.Size, left: torch.Size, right: torch.Size, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def parameters_of(model: nn.Module) -> int:
    """How many parameters a model has."""
    return sum(parameter.numel() for parameter in model.parameters())
