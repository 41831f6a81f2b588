"""Factors in eight bits."""

from __future__ import annotations

import pytest
import torch
from conftest import clip_inputs, clip_tower, experts_of, mlp, mlp_inputs, output, t5, t5_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_bench_smile import add_expert, as_expert, load, metadata_of, save, upscale
from fusion_bench_smile.nn import RoutedLayer, count_bytes, count_parameters, quantize_rows, store_tensors


@given(rows=st.integers(1, 5), columns=st.integers(1, 9), scale=st.floats(1e-6, 1e4), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_int8_rows_are_off_by_half_a_scale(rows: int, columns: int, scale: float, seed: int) -> None:
    values = scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    values[0] = 0
    integers, scales = quantize_rows(values)
    assert integers.dtype == torch.int8
    assert scales.shape == (rows, 1)
    dequantized = integers * scales
    assert ((dequantized - values).abs() <= 0.5001 * scales + 1e-30).all()
    assert not dequantized[0].any()
    assert torch.equal(quantize_rows(dequantized)[0], integers)  # quantized rows stay the same


@given(
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    exponent=st.integers(-36, 4),  # smaller float32 rows have subnormal scales in the dtype of the computation, too
    columns=st.integers(1, 9),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_small_rows_keep_their_digits_in_every_dtype(dtype, exponent: int, columns: int, seed: int) -> None:
    noise = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    values = (10.0**exponent * noise).to(dtype)
    integers, scales = quantize_rows(values)
    assert scales.dtype == dtype
    dequantized = integers.double() * scales.double()
    assert ((dequantized - values.double()).abs() <= 0.51 * scales.double()).all()
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    assert (scales.double() <= values.abs().amax(dim=1, keepdim=True).double() / 126.5 + smallest).all()


def test_only_factors_are_quantized():
    tensors = {"gate": torch.randn(2, 3), "dense": torch.randn(1, 2, 3), "expert_bias": torch.randn(2, 2)}
    assert store_tensors(tensors, "same") == tensors
    stored = store_tensors(tensors, "int8")
    assert list(stored) == ["gate", "gate_scale", "dense", "dense_scale", "expert_bias"]
    assert {name: stored[name].shape for name in ("gate_scale", "dense_scale")} == {
        "gate_scale": (2, 1), "dense_scale": (1, 2, 1),
    }  # fmt: skip
    assert stored["expert_bias"] is tensors["expert_bias"]


@pytest.mark.parametrize("make", [(clip_tower, clip_inputs), (mlp, mlp_inputs), (t5, t5_inputs)])
@pytest.mark.parametrize("options", [{}, {"execution": "grouped"}, {"top_k": 2}, {"k": -1}, {"gate_k": 8, "k": 4}])
def test_int8_factors_are_smaller_and_nearly_as_good(make, options: dict[str, object], tmp_path) -> None:
    base, inputs = (part() for part in make)
    experts = experts_of(base)
    options = {"k": 8, "gate_k": 4, "routing_scope": "two_pass", **options}
    plain, small = (upscale(base, experts, storage=storage, **options) for storage in ("same", "int8"))
    size = count_bytes(base)
    assert count_bytes(small) - size < 0.5 * (count_bytes(plain) - size)
    layer = next(module for module in small.modules() if isinstance(module, RoutedLayer))
    assert layer.gate.dtype == torch.int8
    assert not layer.gate.requires_grad
    with as_expert(plain, "1"), as_expert(small, "1"):  # where scores are nearly equal, rounding may change the choice
        expected, result = output(plain, inputs), output(small, inputs)
        assert (result - expected).norm() < 0.05 * (expected - output(base, inputs)).norm()
    result = output(small, inputs)
    save(small, tmp_path / "model")
    loaded = load(tmp_path / "model", base if make[0] is mlp else None)
    assert torch.equal(output(loaded, inputs), result)
    assert count_parameters(loaded) == metadata_of(small).provenance.parameters[1]


def test_int8_models_change_dtype_and_experts() -> None:
    base = mlp()
    experts = experts_of(base)
    small = upscale(base, experts[:2], k=6, gate_k=3, storage="int8")
    assert all(m.up.dtype == torch.int8 for m in small.double().modules() if isinstance(m, RoutedLayer))
    small.float()
    larger = add_expert(small, experts[2], "2")
    inputs = mlp_inputs()
    expected = output(upscale(base, experts, k=6, gate_k=3, storage="int8"), inputs)
    torch.testing.assert_close(output(larger, inputs), expected, atol=1e-5, rtol=1e-5)
