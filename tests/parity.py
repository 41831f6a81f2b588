"""The framework's implementation of SMILE, to compare with."""

from __future__ import annotations

import copy

from fusion_bench.method import SmileUpscalingAlgorithm
from torch import nn


def upscale_by_framework(base: nn.Module, experts: list[nn.Module], **options: object) -> nn.Module:
    """The model that the framework builds of copies of the given models."""
    method = SmileUpscalingAlgorithm(device="cpu", upscaling_accelerator=None, full_matrices=False, **options)
    return method.merge(copy.deepcopy(base), [copy.deepcopy(expert) for expert in experts])
