"""Measured costs of upscaling: construction, parameters and forward pass over the number of experts and the ranks."""

import statistics
import time
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..construction import upscale
from ..io import ExpertSource
from ..nn import count_parameters
from ..reports import ResourceMeter
from .capture import ModelCall


def costs(
    pretrained: nn.Module, experts: Mapping[str, ExpertSource], points: Sequence[tuple[int, int, int]],
    call: ModelCall, repeats: int = 5,
) -> pd.DataFrame:  # fmt: skip
    """Build upscaled models and measure them.

    Args:
        points: Number of experts T (the first T of `experts`), gate_k and k of each model.
        repeats: Number of forward passes; pretrained and upscaled model alternate, and their medians are compared.

    Returns:
        One row for each point: ``experts``, ``gate_k``, ``k``; ``construction`` (seconds, without a factor cache) and
        ``construction_memory`` (peak in MB, None where the system cannot measure it); ``parameters``, ``flops`` and
        ``forward`` (time), relative to the pretrained model; ``forward_memory`` (peak in MB).
    """
    pretrained_flops, pretrained_parameters = _flops(pretrained, call), count_parameters(pretrained)
    rows = []
    for count, gate_k, k in points:
        meter = ResourceMeter()
        model = upscale(pretrained, dict(list(experts.items())[:count]), gate_k=gate_k, k=k).eval()
        construction = meter.stop()
        meter = ResourceMeter()
        call(model)
        forward = meter.stop()
        times = [(_seconds(call, pretrained), _seconds(call, model)) for _ in range(repeats)]
        pretrained_time, routed_time = (statistics.median(column) for column in zip(*times, strict=True))
        rows.append({
            "experts": count, "gate_k": gate_k, "k": k,
            "construction": construction.seconds, "construction_memory": construction.peak_megabytes,
            "parameters": count_parameters(model) / pretrained_parameters,
            "flops": _flops(model, call) / pretrained_flops,
            "forward": routed_time / pretrained_time, "forward_memory": forward.peak_megabytes,
        })  # fmt: skip
    return pd.DataFrame(rows)


def _seconds(call: ModelCall, model: nn.Module) -> float:
    start = time.perf_counter()
    call(model)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _flops(model: nn.Module, call: ModelCall) -> int:
    # the counter does not know the in-place product
    flops = {torch.ops.aten.addmm_: lambda _, left, right, **__: 2 * left[0] * left[1] * right[1]}
    with FlopCounterMode(display=False, custom_mapping=flops) as counter:
        call(model)
    return counter.get_total_flops()
