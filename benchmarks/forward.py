"""Cost of a forward pass: the routed layer relative to the plain layer and to the framework's.

    python benchmarks/forward.py                     # layers of ViT-B/32 and 4096², and the whole vision tower
    python benchmarks/forward.py --device cuda --dtype bfloat16

Eight experts, gate_k=16, k=32, top_k=1, random weights; both routed layers are built from the same experts. All layers
run in turn; the times are medians. The bound is the ratio of multiplications: those of the plain layer, the router and
one rank-k expert per token, to those of the plain layer.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from construction import delta, framework
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from fusion_bench_smile import upscale

EXPERTS, GATE_K, K = 8, 16, 32
VIT = ((768, 768), (3072, 768), (768, 3072))  # (out, in)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """The seconds of one call, with what it starts on a device."""
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def interleaved(
    functions: Mapping[str, Callable[[], object]], device: torch.device, budget: float = 3.0
) -> dict[str, float]:
    """Median seconds of each function; they are called in turn, in alternating order, for `budget` seconds."""

    times: dict[str, list[float]] = {name: [] for name in functions}
    for run in functions.values():
        seconds_of(run, device)
    end, turn = time.perf_counter() + budget, 0
    while time.perf_counter() < end or turn < 5:
        for name in functions if turn % 2 == 0 else reversed(functions):
            times[name].append(seconds_of(functions[name], device))
        turn += 1
    return {name: statistics.median(values) for name, values in times.items()}


def layers(out: int, in_: int) -> dict[str, nn.Module]:
    """The plain layer, the routed layer of this library and that of the framework, from the same weights."""
    generator = torch.Generator().manual_seed(0)
    base = nn.Sequential(nn.Linear(in_, out))
    experts = [copy.deepcopy(base) for _ in range(EXPERTS)]
    for expert in experts:
        with torch.no_grad():
            expert[0].weight += delta((out, in_), generator)
            expert[0].bias += 0.01 * torch.randn(out, generator=generator)
    ours = upscale(base, experts, gate_k=GATE_K, k=K)
    return {"plain": base, "ours": ours, "framework": framework(copy.deepcopy(base), experts, full=False)}


def bound(out: int, in_: int) -> float:
    """Multiplications of a routed layer per token, relative to the plain layer."""
    return 1 + (EXPERTS * GATE_K * in_ + (K - GATE_K) * in_ + K * out) / (in_ * out)


def activation_bytes(layer: nn.Module, x: Tensor) -> int:
    """Peak memory of a forward pass beyond its input, in bytes, on the CPU or the GPU."""
    if x.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(x.device)
        before = torch.cuda.memory_allocated(x.device)
        layer(x)
        return torch.cuda.max_memory_allocated(x.device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        layer(x)
    allocated = peak = 0
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def layer_rows(shapes: tuple[tuple[int, int], ...], tokens: tuple[int, ...], device: torch.device, dtype: torch.dtype):
    """Print one row of the table for each shape and number of tokens."""
    built = {shape: {n: m.to(device, dtype) for n, m in layers(*shape).items()} for shape in shapes}
    for count in tokens:
        ratios = []
        for (out, in_), models in built.items():
            x = torch.randn(count, in_, device=device, dtype=dtype)
            seconds = interleaved({name: partial(m, x) for name, m in models.items()}, device)
            memory = {name: activation_bytes(m, x) / 1e6 for name, m in models.items()}
            dense, faster = seconds["ours"] / seconds["plain"], seconds["framework"] / seconds["ours"]
            ratios.append((dense, faster, bound(out, in_)))
            milliseconds = ", ".join(f"{value * 1e3:.2f}" for value in seconds.values())
            extra = {name: memory[name] - memory["plain"] for name in ("ours", "framework")}
            print(
                f"| {count} | {out}×{in_} | {milliseconds} | {dense:.2f}× | {ratios[-1][2]:.2f}× | {faster:.2f}× | "
                f"{extra['ours']:.1f}, {extra['framework']:.1f} |",
                flush=True,
            )
        if len(shapes) > 1:
            mean = [statistics.mean(column) for column in zip(*ratios, strict=True)]
            print(f"| {count} | mean | | {mean[0]:.2f}× | {mean[2]:.2f}× | {mean[1]:.2f}× | |", flush=True)


def upscaled(base: nn.Module) -> nn.Module:
    """Upscale a copy of a model with random experts; weights that two models share would stay in the cache."""
    generator = torch.Generator().manual_seed(0)
    experts = [copy.deepcopy(base) for _ in range(EXPERTS)]
    for expert in experts:
        for module in expert.modules():
            if isinstance(module, nn.Linear):
                module.weight.data += delta(tuple(module.weight.shape), generator)  # type: ignore[arg-type]
    return upscale(copy.deepcopy(base), experts, gate_k=GATE_K, k=K)


def tower_row(device: torch.device, dtype: torch.dtype, batch: int, depth: int) -> None:
    """Print the times of a whole vision tower."""
    torch.manual_seed(0)
    base = CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=depth)).eval()
    pixels = torch.randn(batch, 3, 224, 224, device=device, dtype=dtype)
    models = {"plain": base.to(device, dtype), "ours": upscaled(base).to(device, dtype)}
    seconds = interleaved({name: partial(m, pixels) for name, m in models.items()}, device, budget=20)
    print(
        f"\nViT-B/32 with {depth} layers, batch {batch}: plain {seconds['plain'] * 1e3:.0f} ms, ours "
        f"{seconds['ours'] * 1e3:.0f} ms, {seconds['ours'] / seconds['plain']:.2f}× the plain model",
        flush=True,
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the options of device, dtype and threads."""
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)


def set_up(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the options; prints the name of the device and the versions."""
    torch.set_num_threads(options.threads)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    print(f"{name}, {options.dtype}, {options.threads} CPU threads, PyTorch {torch.__version__}\n")
    return device, dtype


@torch.no_grad()
def main() -> None:
    """Print the tables of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device(parser)
    parser.add_argument(
        "--depth", type=int, default=12, help="layers of the whole tower (default: 12); 0 leaves it out"
    )
    options = parser.parse_args()
    device, dtype = set_up(options)
    print(
        "| tokens | layer | ms: plain, ours, framework | ours / plain | bound | faster than the framework's | "
        "MB beyond plain: ours, theirs |"
    )
    print("|---:|---|---|---:|---:|---:|---|")
    layer_rows(VIT, (6304, 1600, 64), device, dtype)
    layer_rows(((4096, 4096),), (1,), device, dtype)
    if options.depth:
        tower_row(device, dtype, 32, options.depth)


if __name__ == "__main__":
    main()
