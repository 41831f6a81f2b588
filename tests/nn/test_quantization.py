"""Factors in eight and in four bits."""

from __future__ import annotations

import pytest
import torch
from conftest import (
    clip_inputs,
    clip_tower,
    experts_of,
    gpt2,
    mlp,
    mlp_inputs,
    output,
    resnet,
    t5,
    t5_inputs,
    to_dtype,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_bench_smile import add_expert, as_expert, load, metadata_of, save, upscale
from fusion_bench_smile.nn import (
    RoutedLayer,
    count_bytes,
    count_parameters,
    quantize_groups,
    quantize_rows,
    routed_layers,
    row_size,
    store_tensors,
)
from fusion_bench_smile.nn.quantization import GROUP, dequantized, largest_rounded, stored_rows

BFLOAT16 = torch.finfo(torch.bfloat16)


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
    packed = store_tensors(tensors, "int4")
    assert list(packed) == list(stored)
    assert {name: tuple(packed[name].shape) for name in ("gate", "dense", "dense_scale")} == {
        "gate": (2, 2), "dense": (1, 2, 2), "dense_scale": (1, 2, 1),
    }  # fmt: skip


@given(
    leading=st.lists(st.integers(1, 3), max_size=3),
    size=st.integers(1, 200),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    exponent=st.integers(-44, 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_int4_groups_are_off_by_half_a_scale(leading: list[int], size: int, dtype, exponent: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*leading, 2, size, generator=generator, dtype=torch.double)
    values[..., GROUP:] *= 1e-3  # the groups have scales of their own
    values = (10.0**exponent * values).to(dtype)
    values[..., 0, :] = 0
    packed, scales = quantize_groups(values)
    stored = stored_rows(values.shape, "int4", dtype)
    assert {"values": (packed.shape, packed.dtype), "scales": (scales.shape, scales.dtype)} == stored
    exact = dequantized(packed, scales, size, torch.double)
    groups = torch.cat([group.abs().amax(-1, keepdim=True).expand_as(group) for group in values.split(GROUP, -1)], -1)
    errors, bound = (exact - values.double()).abs(), groups.double() / 14 * (1 + BFLOAT16.eps)
    assert (errors <= bound + 8 * torch.finfo(torch.float32).tiny).all()  # smaller scales are subnormal in float32
    assert not exact[..., 0, :].any()
    rounded = dequantized(packed, scales, size, dtype)
    step = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    assert ((rounded.double() - exact).abs() <= 2 * torch.finfo(dtype).eps * exact.abs() + 4 * step).all()


@given(largest=st.floats(60000, 65504), size=st.integers(1, 80))
@settings(max_examples=60, deadline=None)
def test_a_row_that_is_within_the_range_is_restored_within_it(largest: float, size: int) -> None:
    row = torch.full((1, size), largest).half()
    for storage, quantize in (("int8", quantize_rows), ("int4", quantize_groups)):
        if largest_rounded(row, storage).isfinite().all():
            assert dequantized(*quantize(row), size, torch.half).isfinite().all()
    assert largest_rounded(torch.full((1, size), 60000.0).half(), "int4").isfinite().all()


@pytest.mark.parametrize("storage", ["same", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1, 7, 64, 65, 192])
def test_the_size_of_a_row_is_that_of_its_tensors(storage: str, dtype: torch.dtype, size: int) -> None:
    tensors = store_tensors({"up": torch.randn(3, size).to(dtype)}, storage).values()
    assert 3 * row_size(size, storage, dtype, in_bytes=True) == sum(tensor.nbytes for tensor in tensors)
    scales = sum(tensor.numel() for tensor in list(tensors)[1:])
    assert 3 * row_size(size, storage, dtype, in_bytes=False) == 3 * size + scales


def images() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(4, 3, 32, 32)}


def token_ids() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(1, 50, (4, 9))}


MODELS = ((clip_tower, clip_inputs), (mlp, mlp_inputs), (t5, t5_inputs), (gpt2, token_ids), (resnet, images))
OPTIONS = ({}, {"execution": "grouped"}, {"top_k": 2}, {"k": -1}, {"gate_k": 8, "k": 4})


@pytest.mark.parametrize(("storage", "size", "error"), [("int8", 0.5, 0.05), ("int4", 0.25, 0.3)])
@pytest.mark.parametrize(("make", "make_inputs"), MODELS)
@pytest.mark.parametrize("options", OPTIONS)
def test_factors_in_few_bits_are_smaller_and_nearly_as_good(
    make, make_inputs, options: dict[str, object], storage: str, size: float, error: float, tmp_path
) -> None:
    base, inputs = make(), make_inputs()
    experts = experts_of(base)
    options = {"k": 8, "gate_k": 4, "routing_scope": "input", "convolutions": make is resnet, **options}
    plain, small = (upscale(base, experts, storage=storage, **options) for storage in ("same", storage))
    before = count_bytes(base)
    assert count_bytes(small) - before < size * (count_bytes(plain) - before)
    layer = next(module for module in small.modules() if isinstance(module, RoutedLayer))
    assert layer.gate.dtype == (torch.int8 if storage == "int8" else torch.uint8)
    assert not layer.gate.requires_grad
    with as_expert(plain, "1"), as_expert(small, "1"):  # where scores are nearly equal, rounding may change the choice
        expected, result = output(plain, inputs), output(small, inputs)
        assert (result - expected).norm() < error * (expected - output(base, inputs)).norm()
    result = output(small, inputs)
    save(small, tmp_path / "model")
    loaded = load(tmp_path / "model", base if make is mlp else None).eval()
    assert torch.equal(output(loaded, inputs), result)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in small.state_dict().items())
    assert count_parameters(loaded) == metadata_of(small).provenance.parameters[1]
    for layer in routed_layers(small).values():
        layer.dequantize()
    assert torch.equal(output(small, inputs), result)
    assert not any(name.endswith("_scale") for name, _ in small.named_parameters())


def test_an_expert_is_added_to_int8_factors() -> None:
    base, inputs = mlp(), mlp_inputs()
    experts, options = experts_of(base), {"k": 6, "gate_k": 3, "storage": "int8"}
    larger = add_expert(upscale(base, experts[:2], **options), experts[2], "2")
    expected = output(upscale(base, experts, **options), inputs)
    torch.testing.assert_close(output(larger, inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("storage", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_keeps_the_integers(storage: str, dtype: torch.dtype) -> None:
    base, inputs = mlp(), mlp_inputs()
    model = upscale(base, experts_of(base), k=6, gate_k=3, top_k=3, storage=storage)
    expected, before = output(model, inputs), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(dtype)
    for name, tensor in model.state_dict().items():
        is_kept = not before[name].is_floating_point()
        assert torch.equal(tensor, before[name]) if is_kept else tensor.dtype == dtype
    result = output(model, to_dtype(inputs, dtype))
    assert (result - expected).norm() < 3 * torch.finfo(dtype).eps * expected.norm() + 1e-5
