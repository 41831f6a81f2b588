"""The framework's implementation of SMILE, to compare with."""

from __future__ import annotations

import copy
from importlib.metadata import version

import pytest
from fusion_bench.method import SmileUpscalingAlgorithm
from torch import nn

# its next release takes an expert's bias as the difference from the pretrained one
PINNED_VERSION = "0.2.33"


def require_version(installed: str | None = None) -> None:
    """Skip a test of parity on another release of the framework than the one that it is pinned to."""
    installed = installed or version("fusion-bench")
    if installed != PINNED_VERSION:
        pytest.skip(f"parity is pinned to fusion-bench {PINNED_VERSION}; {installed} may compute something else")


def upscale_by_framework(base: nn.Module, experts: list[nn.Module], **options: object) -> nn.Module:
    """The model that the framework builds of copies of the given models; see `require_version`."""
    require_version()
    method = SmileUpscalingAlgorithm(device="cpu", upscaling_accelerator=None, full_matrices=False, **options)
    return method.merge(copy.deepcopy(base), [copy.deepcopy(expert) for expert in experts])
