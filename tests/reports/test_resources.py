"""Seconds and peak memory of a stage."""

from __future__ import annotations

import pytest
import torch

from fusion_bench_smile.reports import ResourceMeter


def test_the_meter_includes_a_peak_of_freed_memory():
    meter = ResourceMeter()
    block = torch.ones(50_000_000)  # 200 MB
    del block
    stage = meter.stop()
    assert stage.seconds > 0
    if stage.peak_host_bytes is None:
        pytest.skip("this system can't reset the peak")
    assert 190e6 < stage.peak_host_bytes < 400e6
    assert ResourceMeter().stop().peak_host_bytes < 50e6  # the former peak doesn't count any more
