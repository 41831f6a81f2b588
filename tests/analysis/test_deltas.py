"""Task vectors, layer by layer."""

from __future__ import annotations

import torch
from conftest import experts_of, mlp

from fusion_bench_smile.analysis import layer_deltas


def test_deltas_are_the_differences_of_the_weights():
    base = mlp()
    first, second = experts_of(base, 2)
    loads = []

    def load():
        loads.append(1)
        return second

    layers = list(layer_deltas(base, {"module": first, "function": load}))
    assert [layer.name for layer in layers] == ["0", "3"]
    assert [layer.type for layer in layers] == ["0", "3"]
    for layer in layers:
        weight = base.get_submodule(layer.name).weight
        assert torch.equal(layer.weight, weight)
        for name, expert in (("module", first), ("function", second)):
            assert torch.equal(layer.experts[name], expert.get_submodule(layer.name).weight - weight)
    assert len(loads) == 1
