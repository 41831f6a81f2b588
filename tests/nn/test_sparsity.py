"""Dropped deltas: one entry of each block is kept and rescaled, at places that follow from the sizes alone."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conftest import clip_tower, experts_of, output, tied_llama
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fusion_bench_smile import as_expert, upscale
from fusion_bench_smile.exceptions import PlanError
from fusion_bench_smile.nn import count_bytes, count_parameters, routed_layers
from fusion_bench_smile.nn.sparsity import drop, kept_positions, num_kept, restore

CPU = torch.device("cpu")


@given(st.integers(1, 3000), st.floats(1e-3, 0.999))
def test_one_entry_of_each_block_is_kept(size: int, density: float) -> None:
    count = num_kept(size, density)
    assert count == max(1, round(size * density))
    positions = kept_positions(size, count, CPU)
    blocks = torch.arange(count + 1) * size // count
    assert ((blocks[:-1] <= positions) & (positions < blocks[1:])).all()


def test_positions_are_the_same_for_ever() -> None:
    """Checkpoints do not store them. The hash is compared with MurmurHash3's, in Python's integers."""

    def finalizer(h: int) -> int:
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            h = (h ^ (h >> shift)) * factor % 2**32
        return h ^ (h >> 16)

    size, count = 384 * 1536, num_kept(384 * 1536, 0.02)
    bounds = [i * size // count for i in range(count + 1)]
    expected = [a + (finalizer(i) * (b - a) >> 32) for i, (a, b) in enumerate(pairwise(bounds))]
    assert kept_positions(size, count, CPU).tolist() == expected
    assert kept_positions(20, 5, CPU).tolist() == [0, 5, 8, 14, 16]


def test_entries_are_spread_evenly() -> None:
    """Over the rows, the columns and the places in a block."""
    rows, columns = 256, 320
    positions = kept_positions(rows * columns, num_kept(rows * columns, 0.1), CPU)
    for values, kinds in ((positions // columns, rows), (positions % columns, columns), (positions % 10, 10)):
        counts = values.bincount(minlength=kinds).double()
        mean = len(positions) / kinds
        assert (counts - mean).square().mean() < 2 * mean  # of a Poisson variable it is the mean


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dropped_deltas_are_rescaled(dtype: torch.dtype) -> None:
    delta = torch.randn(24, 50).to(dtype)
    kept = drop(delta, 0.1)
    assert kept.shape == (120,)
    (restored,) = restore(kept[None], (24, 50))
    assert torch.equal(restored[restored != 0], delta[restored != 0] * 10)
    assert (restored != 0).sum() == 120
    torch.testing.assert_close(drop(restored, 0.1) / 10, kept)


def test_the_output_is_that_of_the_delta_on_average() -> None:
    """The products of many inputs with a large delta differ by little from those with a tenth of its entries."""
    delta, x = torch.randn(400, 4000), torch.randn(50, 4000)
    (restored,) = restore(drop(delta, 0.1)[None], (400, 4000))
    exact, dropped = x @ delta.mT, x @ restored.mT
    slope = (exact * dropped).sum() / exact.square().sum()
    assert slope == pytest.approx(1, abs=0.02)


@torch.no_grad()
@pytest.mark.parametrize("storage", ["same", "int8", "int4"])
@pytest.mark.parametrize("scope", ["token", "input"])
def test_a_model_of_dropped_experts_is_small_and_computes_with_their_deltas(scope: str, storage: str) -> None:
    base = clip_tower().double()
    experts = [expert.double() for expert in experts_of(base)]
    model = upscale(base, experts, gate_k=2, k=-1, density=0.1, routing_scope=scope, storage=storage)
    dense = upscale(base, experts, gate_k=2, k=-1, routing_scope=scope, storage=storage)
    assert count_bytes(model) - count_bytes(base) < 0.4 * (count_bytes(dense) - count_bytes(base))
    for name, layer in routed_layers(model).items():
        start = base.get_submodule(name).weight
        for index, expert in enumerate(experts):
            delta = expert.get_submodule(name).weight - start
            (expected,) = restore(drop(delta, 0.1)[None], tuple(delta.shape))
            tolerance = {"same": 1e-12, "int8": 0.01, "int4": 0.15}[storage] * float(expected.abs().max())
            torch.testing.assert_close(layer.rows("dense", index)[0], expected, atol=tolerance, rtol=0)
    inputs = {"pixel_values": torch.randn(3, 3, 28, 28, dtype=torch.double)}
    if scope == "input":
        with as_expert(model, "1"):
            result = output(model, inputs)
        by_hand = clip_tower().double()
        by_hand.load_state_dict(base.state_dict())
        for name, layer in routed_layers(model).items():
            plain = by_hand.get_submodule(name)
            plain.weight += layer.rows("dense", 1)[0]
            plain.bias += layer.expert_bias[1]
        torch.testing.assert_close(result, output(by_hand, inputs), rtol=1e-9, atol=1e-9)
    assert output(model, inputs).isfinite().all()
    entries = sum(num_kept(layer.weight.numel(), 0.1) for layer in routed_layers(model).values())
    rows = sum(2 * layer.weight.shape[1] + layer.weight.shape[0] for layer in routed_layers(model).values())
    scales = sum(p.numel() for name, p in model.named_parameters() if name.endswith("_scale"))
    assert count_parameters(model) - count_parameters(base) == 3 * (entries + rows) + scales


def test_a_head_of_dropped_experts_is_not_resized() -> None:
    base = tied_llama()
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.clone())
    base.config.tie_word_embeddings = False
    model = upscale(base, experts_of(base), k=-1, gate_k=2, density=0.1)
    with pytest.raises(PlanError, match="resize the embeddings of all models before upscaling"):
        model.resize_token_embeddings(50)
    with pytest.raises(PlanError, match="resize the embeddings of all models before upscaling"):
        model.resize_token_embeddings(None, pad_to_multiple_of=64)
    for arguments in ((), (40,), (33, 8)):
        assert model.resize_token_embeddings(*arguments).weight.shape[0] == 40
