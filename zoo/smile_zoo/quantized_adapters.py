"""PEFT adapters in 4 bits, the form in which the zoo ships large ones, and their way back to PEFT's format.

The factors of an adapter (``lora_A`` and ``lora_B``) are stored as integers from −7 to 7, two in a byte, in groups of
64 with one scale. Groups run along the longer side of a factor, so ranks of different size share no scale where that
side is a multiple of 64. All other tensors are stored in float16.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from fusion_bench_smile.exceptions import SmileError
from fusion_bench_smile.io import ADAPTER_CONFIG
from smile_zoo.cache import cached_folder

QUANTIZED_FILE, ADAPTER_FILE = "adapter_model.int4.safetensors", "adapter_model.safetensors"
FACTORS = (".lora_A.weight", ".lora_B.weight")
SCALES = ".scales"  # suffix of the name of a factor's scales
GROUP, LARGEST = 64, 7


def quantize(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Round a tensor to 15 levels in each group of 64 consecutive values; the last group is padded with zeros.

    Args:
        tensor: N values of any shape.

    Returns:
        The integers, (⌈N / 64⌉, 32) bytes, the first one of each two in the low bits; and the scales (⌈N / 64⌉,), in
        float16. No value changes by more than half of its group's scale.

    Raises:
        SmileError: if a value is not finite, or too large for a float16 scale.
    """
    groups = F.pad(tensor.detach().float().flatten(), (0, -tensor.numel() % GROUP)).view(-1, GROUP)
    exact = groups.abs().amax(dim=1) / LARGEST
    scales = exact.half()
    scales = torch.where(scales.float() < exact, torch.nextafter(scales, scales.new_tensor(torch.inf)), scales)
    if not scales.isfinite().all():
        raise SmileError("a tensor has values that are not finite, or too large for a scale in float16")
    steps = torch.where(scales > 0, scales, 1).float()
    integers = (groups / steps[:, None]).round().to(torch.int8) + 8  # 1 … 15
    return pack(integers.to(torch.uint8)), scales


def dequantize(packed: Tensor, scales: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The values of `quantize`, in float32.

    Args:
        packed: integers, (G, 32) bytes.
        scales: (G,).
        shape: of the tensor.
    """
    values = (unpack(packed).float() - 8) * scales.float()[:, None]
    return values.flatten()[: torch.Size(shape).numel()].view(shape)


def pack(values: Tensor) -> Tensor:
    """Values from 0 to 15, (…, 2n) bytes → two in a byte, (…, n)."""
    return values[..., 0::2] | (values[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`: (…, n) bytes → (…, 2n) bytes from 0 to 15."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def write_quantized(adapter_folder: Path, folder: Path) -> None:
    """Write a PEFT adapter in 4 bits, with its configuration; an existing folder is replaced.

    Args:
        adapter_folder: the adapter in PEFT's format, as safetensors.
        folder: for `QUANTIZED_FILE` and ``adapter_config.json``.

    Raises:
        SmileError: see `quantize`.
    """
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in load_file(adapter_folder / ADAPTER_FILE).items():
        if name.endswith(FACTORS):
            shapes[name] = list(tensor.shape)
            tensors[name], tensors[name + SCALES] = quantize(_long_rows(tensor))
        else:
            tensors[name] = tensor.half().contiguous()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file(tensors, folder / QUANTIZED_FILE, {"shapes": json.dumps(shapes)})
    shutil.copy(adapter_folder / ADAPTER_CONFIG, folder / ADAPTER_CONFIG)


def read_quantized(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter that `write_quantized` wrote, by PEFT's names, in float16.

    Raises:
        SmileError: if the file is missing or corrupt.
    """
    file = folder / QUANTIZED_FILE
    try:
        with safe_open(file, "pt") as stored:
            shapes = json.loads(stored.metadata()["shapes"])
            names = [name for name in stored.keys() if not name.endswith(SCALES)]  # noqa: SIM118  no mapping
            return {name: _read(stored, name, shapes.get(name)) for name in names}
    except (OSError, SafetensorError, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise SmileError(f"{file} is no adapter in 4 bits: {error}") from None


def unpacked_adapter(folder: Path) -> Path:
    """The folder of an ordinary PEFT adapter in float16 with the content of one in 4 bits.

    It lies in the cache, under a name with the digest of the files; see `smile_zoo.cache.cached_folder`.

    Args:
        folder: as `write_quantized` wrote it.

    Raises:
        SmileError: if a file is missing or corrupt, or the cache can't be written.
    """
    try:
        content = [(folder / name).read_bytes() for name in (QUANTIZED_FILE, ADAPTER_CONFIG)]
    except OSError as error:
        raise SmileError(f"{folder} holds no adapter in 4 bits: {error}") from None
    digest = hashlib.sha256(b"".join(content)).hexdigest()[:16]

    def build(target: Path) -> None:
        save_file(read_quantized(folder), target / ADAPTER_FILE, {"format": "pt"})
        (target / ADAPTER_CONFIG).write_bytes(content[1])

    return cached_folder(f"adapter-{digest}", build)


def _long_rows(tensor: Tensor) -> Tensor:
    return tensor.T if tensor.shape[0] > tensor.shape[1] else tensor


def _read(stored: safe_open, name: str, shape: list[int] | None) -> Tensor:
    tensor = stored.get_tensor(name)
    if shape is None:
        return tensor
    rows, columns = min(shape), max(shape)
    values = dequantize(tensor, stored.get_tensor(name + SCALES), (rows, columns))
    return (values if shape[0] <= shape[1] else values.T).half().contiguous()
