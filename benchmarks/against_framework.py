"""Construction and forward of SMILE against the framework's own, in the same run, as ratios.

    python benchmarks/against_framework.py [--layers 2] [--experts 4] [--gate-k 16] [--k 32]

The model is a CLIP vision tower of ViT-B/32's width with few layers and random weights: neither the time nor the memory
depends on what the weights are. Each construction runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel


def models(layers: int, experts: int) -> tuple[nn.Module, list[nn.Module]]:
    torch.manual_seed(0)
    base = CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=layers)).eval()
    tuned = [copy.deepcopy(base) for _ in range(experts)]
    with torch.no_grad():
        for expert in tuned:
            for parameter in expert.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.002)
    return base, tuned


def construct(which: str, base: nn.Module, tuned: list[nn.Module], gate_k: int, k: int) -> nn.Module:
    if which == "ours":
        from fusion_bench_smile import upscale

        return upscale(base, tuned, gate_k=gate_k, k=k)
    from fusion_bench.method import SmileUpscalingAlgorithm

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        method = SmileUpscalingAlgorithm(device="cpu", upscaling_accelerator=None, gate_k=gate_k, k=k, top_k=1)
        return method.merge(base, tuned)


def seconds(function, repeats: int = 5) -> float:
    function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure(which: str, layers: int, experts: int, gate_k: int, k: int) -> dict[str, float]:
    """What one process measures."""
    base, tuned = models(layers, experts)
    plain = copy.deepcopy(base)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    model = construct(which, base, tuned, gate_k, k)
    built = time.perf_counter() - started
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    pixels = torch.randn(16, 3, 224, 224)
    with torch.no_grad():
        forward, dense = seconds(lambda: model(pixels)), seconds(lambda: plain(pixels))
    parameters = sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in plain.parameters())
    return {
        "construction (s)": built,
        "memory beyond the models (MB)": memory,
        "forward (× pretrained)": forward / dense,
        "parameters (× pretrained)": parameters,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--gate-k", type=int, default=16)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--only", choices=["ours", "framework"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        result = measure(options.only, options.layers, options.experts, options.gate_k, options.k)
        print(json.dumps(result))
        return
    results = {}
    for which in ("framework", "ours"):
        command = [sys.executable, __file__, *sys.argv[1:], "--only", which]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        results[which] = json.loads(done.stdout.splitlines()[-1])
    print(f"{'':32}{'framework':>12}{'ours':>12}{'framework/ours':>16}")
    for name, theirs in results["framework"].items():
        ours = results["ours"][name]
        print(f"{name:32}{theirs:12.2f}{ours:12.2f}{theirs / ours:16.2f}")


if __name__ == "__main__":
    main()
