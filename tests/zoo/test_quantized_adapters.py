"""Adapters in 4 bits: packing is exact, rounding stays within half a step, the cache holds ordinary adapters."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import gpt2
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from fusion_bench_smile.exceptions import SmileError
from smile_zoo.quantized_adapters import (
    GROUP,
    QUANTIZED_FILE,
    dequantize,
    pack,
    quantize,
    read_quantized,
    unpack,
    unpacked_adapter,
    write_quantized,
)


@given(st.lists(st.integers(0, 15), min_size=2, max_size=200).filter(lambda values: len(values) % 2 == 0))
def test_packing_is_exact(values):
    packed = pack(torch.tensor(values, dtype=torch.uint8))
    assert packed.numel() == len(values) / 2
    assert unpack(packed).tolist() == values


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 150), st.floats(-9, 3))
def test_no_value_changes_by_more_than_half_a_step(seed, rows, columns, magnitude):
    generator = torch.Generator().manual_seed(seed)
    tensor = 10**magnitude * torch.randn(rows, columns, generator=generator).pow(3)
    packed, scales = quantize(tensor)
    restored = dequantize(packed, scales, (rows, columns))
    steps = scales.float().repeat_interleave(GROUP)[: tensor.numel()].view_as(tensor)
    assert ((restored - tensor).abs() <= 0.5001 * steps).all()
    again = dequantize(*quantize(restored), (rows, columns))
    assert ((again - restored).abs() <= 0.5001 * steps).all()


def test_multiples_of_the_scale_are_kept_exactly():
    tensor = (torch.arange(GROUP) % 15 - 7).float() * 0.25
    assert torch.equal(dequantize(*quantize(tensor), (GROUP,)), tensor)
    assert torch.equal(dequantize(*quantize(torch.zeros(5, 3)), (5, 3)), torch.zeros(5, 3))
    with pytest.raises(SmileError, match="not finite"):
        quantize(torch.tensor([1.0, torch.inf]))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, modules_to_save=["ln_f"])
    model = get_peft_model(gpt2(), config)
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def test_an_adapter_in_4_bits_is_an_ordinary_one_in_the_cache(adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_quantized(adapter, tmp_path / "small")
    with ThreadPoolExecutor() as executor:
        folders = set(executor.map(lambda _: unpacked_adapter(tmp_path / "small"), range(4)))
    (folder,) = folders
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # no temporary folder is left
    before, after = load_file(adapter / "adapter_model.safetensors"), load_file(folder / "adapter_model.safetensors")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == torch.float16
        if "lora_" in name:
            errors = (after[name].float() - tensor).abs()
            assert errors.max() <= tensor.abs().max() / 14 * 1.01
            assert errors.norm() < 0.2 * tensor.norm()
        else:
            torch.testing.assert_close(after[name], tensor.half())
    assert (folder / "adapter_config.json").read_text() == (adapter / "adapter_config.json").read_text()
    PeftModel.from_pretrained(gpt2(), str(folder))
    write_quantized(folder, tmp_path / "other")
    assert unpacked_adapter(tmp_path / "other") != folder


def test_what_is_no_such_adapter_is_one_line(adapter, tmp_path, monkeypatch):
    with pytest.raises(SmileError, match="holds no adapter in 4 bits"):
        unpacked_adapter(adapter)
    write_quantized(adapter, tmp_path / "small")
    (tmp_path / "small" / QUANTIZED_FILE).write_bytes(json.dumps({"no": "tensors"}).encode())
    with pytest.raises(SmileError, match="is no adapter in 4 bits"):
        read_quantized(tmp_path / "small")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    write_quantized(adapter, tmp_path / "small")
    with pytest.raises(SmileError, match="set XDG_CACHE_HOME"):
        unpacked_adapter(tmp_path / "small")
