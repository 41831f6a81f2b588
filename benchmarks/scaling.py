"""Projected cost of upscaling a model that is too large for this machine, from its plan and measured constants.

    python benchmarks/scaling.py                          # Mistral-7B, 8 experts, on 1, 8 and 64 processes
    python benchmarks/scaling.py --device cuda            # on an accelerator

The time to factorize one delta of every shape is measured on the device. The bandwidths of files and of the network
depend on the cluster and are options. Everything else follows from the plan of the architecture, which is built without
weights. The report is Markdown.
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
from fusion_bench_smile.construction import LayerPlan, Plan, make_plan, truncated_svd

GB = 1e9


def mistral(experts: int) -> Plan:
    """The plan of Mistral-7B in bfloat16."""
    with torch.device("meta"):
        model = MistralForCausalLM(MistralConfig()).to(torch.bfloat16)  # its defaults are Mistral-7B-v0.1's
    return make_plan(model, experts, SmileConfig(gate_k=16, k=32))


def shape(layer: LayerPlan) -> tuple[int, int, int]:
    """Output features, input features and rank of a layer."""
    return layer.out_features, layer.in_features, layer.rank


def seconds_each(plan: Plan, device: torch.device) -> dict[tuple[int, int, int], float]:
    """Seconds to factorize one float32 delta of each shape on the device."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def once(matrix: Tensor, rank: int) -> float:
        synchronize()
        started = time.perf_counter()
        truncated_svd(matrix, rank)
        synchronize()
        return time.perf_counter() - started

    generator = torch.Generator().manual_seed(0)
    truncated_svd(delta((512, 512), generator).to(device), 32)
    seconds = {}
    for key in sorted({shape(layer) for layer in plan.layers}):
        matrix = delta(key[:2], generator).to(device)
        seconds[key] = min(once(matrix, key[2]) for _ in range(2))
    return seconds


def layer_table(plan: Plan, seconds: dict[tuple[int, int, int], float], experts: int) -> list[str]:
    """The measured times, as Markdown."""
    lines = ["| layer | count | one delta | all experts |", "|---|---:|---:|---:|"]
    for key, count in Counter(shape(layer) for layer in plan.layers).items():
        each = seconds[key]
        lines.append(f"| {key[0]}×{key[1]} | {count} | {each:.2f} s | {each * count * experts / 60:.1f} min |")
    return lines


def projection(plan: Plan, factorization: float, options: argparse.Namespace) -> list[str]:
    """The time on each number of processes, as Markdown.

    Args:
        plan: of the model.
        factorization: seconds of all factorizations on one device.
        options: of the command line.
    """
    size = plan.layers[0].itemsize
    base = size * plan.parameters
    added = size * plan.max_added_parameters
    experts = size * options.experts * sum(tensor.numel() for tensor in plan.tensors.values())
    working = plan.num_workers(torch.device(options.device)) * max(layer.working_bytes for layer in plan.layers)
    lines = [
        "",
        f"The pretrained model has {base / GB:.1f} GB, all experts {experts / GB:.0f} GB, the added parameters "
        f"{added / GB:.1f} GB. The peak memory of a process is {(base + added + working) / GB:.1f} GB: the pretrained "
        f"model, the added parameters, and {working / GB:.2f} GB for the deltas that are being factorized.",
        "",
        "| processes | read by each | reading | factorizing | received by each | exchange | total | slowest part |",
        "|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for count in options.processes:
        rate = min(options.read, options.shared_read / count) * GB
        received = added * (count - 1) / count
        parts = {
            "reading the pretrained model": base / rate,
            "reading the experts": experts / count / rate,
            "factorizing": factorization / count,
            "exchange": received / (options.exchange * GB),
        }
        cells = [
            f"{count}",
            f"{(base + experts / count) / GB:.1f} GB",
            f"{(parts['reading the pretrained model'] + parts['reading the experts']) / 60:.1f} min",
            f"{parts['factorizing'] / 60:.1f} min",
            f"{received / GB:.2f} GB",
            f"{parts['exchange'] / 60:.2f} min",
            f"{sum(parts.values()) / 60:.1f} min",
            max(parts, key=lambda part: parts[part]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cpu")
    options.add_argument("--experts", type=int, default=8)
    options.add_argument("--processes", type=int, nargs="+", default=[1, 8, 64])
    options.add_argument("--read", type=float, default=2.0, help="GB/s read by one process (default: 2)")
    options.add_argument("--shared-read", type=float, default=20.0, help="GB/s of the file system (default: 20)")
    options.add_argument("--exchange", type=float, default=1.0, help="GB/s received by a process (default: 1)")
    return options


def main() -> None:
    """Print the projection of the command line."""
    options = parser().parse_args()
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.processor() or 'CPU'}"
    plan = mistral(options.experts)
    seconds = seconds_each(plan, device)
    factorization = options.experts * sum(seconds[shape(layer)] for layer in plan.layers)
    print(f"Measured on {name}, {torch.get_num_threads()} CPU threads; k=32, gate_k=16.\n")
    print("\n".join(layer_table(plan, seconds, options.experts) + projection(plan, factorization, options)))


if __name__ == "__main__":
    main()
