"""What upscaling a model too large for this machine would cost: its plan, times constants that are measured here.

    python benchmarks/scaling.py                          # Mistral-7B, 8 experts, on 1, 8 and 64 processes
    python benchmarks/scaling.py --device cuda            # on an accelerator

Measured: the seconds to factor one delta of every shape, on the device. Given, as options: how fast files are read and
how fast processes exchange; both depend on the cluster. Derived: all the rest, from the plan of the real architecture,
built without weights. The report is Markdown.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections import Counter

import torch
from construction import delta
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from fusion_bench_smile.config import SmileConfig
from fusion_bench_smile.factors import truncated_svd
from fusion_bench_smile.plan import LayerPlan, Plan, make_plan

GB = 1e9


def mistral(experts: int) -> Plan:
    with torch.device("meta"):
        model = MistralForCausalLM(MistralConfig()).to(torch.bfloat16)  # its defaults are Mistral-7B-v0.1's
    return make_plan(model, experts, SmileConfig(gate_k=16, k=32))


def shape(layer: LayerPlan) -> tuple[int, int, int]:
    return layer.out_features, layer.in_features, layer.rank


def seconds_each(plan: Plan, device: torch.device) -> dict[tuple[int, int, int], float]:
    """Seconds to factor one delta of each shape, from a float32 tensor on the device."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def once(matrix: Tensor, rank: int) -> float:
        synchronize()
        began = time.perf_counter()
        truncated_svd(matrix, rank)
        synchronize()
        return time.perf_counter() - began

    generator = torch.Generator().manual_seed(0)
    truncated_svd(delta((512, 512), generator).to(device), 32)
    seconds = {}
    for key in sorted({shape(layer) for layer in plan.layers}):
        matrix = delta(key[:2], generator).to(device)
        seconds[key] = min(once(matrix, key[2]) for _ in range(2))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--read", type=float, default=2.0, help="GB/s that one process reads from files (default: 2)")
    parser.add_argument("--shared-read", type=float, default=20.0, help="GB/s of the file system in all (default: 20)")
    parser.add_argument("--exchange", type=float, default=1.0, help="GB/s at which a process receives (default: 1)")
    options = parser.parse_args()
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.processor() or 'CPU'}"
    plan = mistral(options.experts)
    seconds = seconds_each(plan, device)

    print(f"Measured on {name}, {torch.get_num_threads()} CPU threads; k=32, gate_k=16.\n")
    print("| layer | how many | one delta | all experts |\n|---|---:|---:|---:|")
    for key, count in Counter(shape(layer) for layer in plan.layers).items():
        each = seconds[key]
        print(f"| {key[0]}×{key[1]} | {count} | {each:.2f} s | {each * count * options.experts / 60:.1f} min |")

    size = plan.layers[0].itemsize
    base = size * plan.parameters
    added = size * sum(layer.added(options.experts) for layer in plan.layers)
    experts = size * options.experts * sum(tensor.numel() for tensor in plan.tensors.values())
    factoring = options.experts * sum(seconds[shape(layer)] for layer in plan.layers)
    working = plan.workers(device) * max(layer.working_bytes for layer in plan.layers)
    print(
        f"\nThe pretrained model is {base / GB:.1f} GB, the experts {experts / GB:.0f} GB in all, what the result adds "
        f"{added / GB:.1f} GB. Every process holds {(base + added + working) / GB:.1f} GB at its peak: the pretrained "
        f"model, the added parameters, and {working / GB:.2f} GB for the deltas in work.\n"
    )
    print("| processes | read by each | reading | factoring | received by each | exchange | in all | slowest part |")
    print("|---:|---:|---:|---:|---:|---:|---:|---|")
    for count in options.processes:
        rate = min(options.read, options.shared_read / count) * GB
        received = added * (count - 1) / count
        parts = {
            "reading the pretrained model": base / rate,
            "reading the experts": experts / count / rate,
            "factoring": factoring / count,
            "exchange": received / (options.exchange * GB),
        }
        reading = parts["reading the pretrained model"] + parts["reading the experts"]
        cells = [
            f"{count}",
            f"{(base + experts / count) / GB:.1f} GB",
            f"{reading / 60:.1f} min",
            f"{parts['factoring'] / 60:.1f} min",
            f"{received / GB:.2f} GB",
            f"{parts['exchange'] / 60:.2f} min",
            f"{sum(parts.values()) / 60:.1f} min",
            max(parts, key=lambda part: parts[part]),
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
