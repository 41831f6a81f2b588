"""Upscaled models to save, and damage to checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import ARCHITECTURES, experts_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fusion_bench_smile import upscale

# a checkpoint of format 3 as an earlier release wrote it, without what it did not need
MINIMAL = {
    "layers": {
        "0": {
            "ranks": [2, 2], "gate_ranks": [1, 1], "top_k": 1, "shared_router": True, "expert_bias": False,
            "execution": "auto", "score": "norm", "storage": "same",
        }
    },
    "experts": ["a", "b"],
    "options": {"gate_k": 1, "k": 2, "device": "cuda:7", "upscaling_accelerator": "cuda:7"},
    "format_version": 3,
}  # fmt: skip


def upscaled(architecture: str, **options: object) -> tuple[nn.Module, dict[str, Tensor]]:
    """An upscaled model of one of `ARCHITECTURES`, and inputs for it."""
    make_model, make_inputs = ARCHITECTURES[architecture]
    base = make_model()
    return upscale(base, experts_of(base), **{"gate_k": 2, "k": 4, **options}), make_inputs()


def damage(kind: str, folder: Path) -> None:
    """Damage the checkpoint of a vision tower."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(weights)
    routed = next(name for name in tensors if name.endswith(".up"))
    plain = next(name for name in tensors if "layer_norm1" in name)
    values = json.loads(config.read_text())
    if kind == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "garbage weights":
        weights.write_bytes(b"not a safetensors file")
    elif kind == "no weights":
        weights.unlink()
    elif kind == "no config":
        config.unlink()
    elif kind == "broken config":
        config.write_text(config.read_text()[:50])
    elif kind == "missing expert tensor":
        save_file({k: v for k, v in tensors.items() if k != routed}, weights, {"format": "pt"})
    elif kind == "missing plain tensor":
        save_file({k: v for k, v in tensors.items() if k != plain}, weights, {"format": "pt"})
    elif kind == "wrong shape":
        save_file({**tensors, routed: tensors[routed][:, :-1].contiguous()}, weights, {"format": "pt"})
    elif kind in ("newer format", "older format"):
        values["quantization_config"]["format_version"] = 99 if kind == "newer format" else 1
        config.write_text(json.dumps(values))
    elif kind == "another model":
        del values["quantization_config"]
        config.write_text(json.dumps(values))
    elif kind == "contradicting option":
        layer = next(iter(values["quantization_config"]["layers"].values()))
        layer["top_k"] = 3
        config.write_text(json.dumps(values))
