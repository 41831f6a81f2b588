"""Cost of building a SMILE model, relative to the framework's SMILE in the same run.

    python benchmarks/construction.py                      # everything, as documented: more than an hour on two cores
    python benchmarks/construction.py --layers 2 vit lora  # 2 instead of 12 transformer layers, two of the benchmarks

The models are random, with real shapes; the deltas have a decaying spectrum plus noise. Both implementations process
the same weights, in alternating order, after a warm-up. Ratios are of medians.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fusion_bench.modelpool import BaseModelPool
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration

from fusion_bench_smile import SmileUpscalingAlgorithm, upscale
from fusion_bench_smile.construction import truncated_svd

GATE_K, K = 16, 32


def vit(layers: int) -> nn.Module:
    """A random vision tower of ViT-B/32's width."""
    torch.manual_seed(0)
    return CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=layers)).eval()


def flan_t5(layers: int) -> T5Config:
    """Flan-T5-base with a number of encoder and of decoder layers."""
    return T5Config(
        vocab_size=32128, d_model=768, d_kv=64, d_ff=2048, num_layers=layers, num_decoder_layers=layers, num_heads=12,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip


def delta(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A delta (out, in) whose singular values decay as a power law, plus noise."""
    directions = min(256, *shape)
    left = torch.linalg.qr(torch.randn(shape[0], directions, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(shape[1], directions, generator=generator)).Q
    values = torch.arange(1, directions + 1) ** -0.7
    noise = torch.randn(shape, generator=generator) * (0.1 / max(shape) ** 0.5)
    return 0.05 * (left * values @ right.T + noise)


@torch.no_grad()
def tuned(base: nn.Module, number: int) -> nn.Module:
    """A copy of a model with a random delta in every linear layer."""
    generator = torch.Generator().manual_seed(number + 1)
    expert = copy.deepcopy(base)
    for module in expert.modules():
        if isinstance(module, nn.Linear):
            module.weight += delta(tuple(module.weight.shape), generator)  # type: ignore[arg-type]
    return expert


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Discard standard output and error inside the ``with`` block."""
    with Path(os.devnull).open("w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        yield


def framework(base: nn.Module, experts: list[nn.Module], full: bool) -> nn.Module:
    """Upscale with the framework's SMILE. The inputs are modified: the time includes no copies."""
    from fusion_bench.method import SmileUpscalingAlgorithm

    with quiet():
        method = SmileUpscalingAlgorithm(
            device="cpu", upscaling_accelerator=None, full_matrices=full, gate_k=GATE_K, k=K, top_k=1
        )
        return method.merge(base, experts)


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call, after a garbage collection."""
    gc.collect()
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def compare(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each function; they are called in alternating order."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats):
        for name in list(functions) if repeat % 2 == 0 else list(reversed(functions)):
            times[name].append(timed(functions[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def report(title: str, seconds: Mapping[str, float]) -> None:
    """Print the seconds of each implementation, and their ratios to ``ours``."""
    parts = [f"{name} {value:.2f} s" for name, value in seconds.items()]
    ratios = [f"{value / seconds['ours']:.1f}× {name}" for name, value in seconds.items() if name != "ours"]
    print(f"{title}: {', '.join(parts)}; faster by {', '.join(ratios)}", flush=True)


def quality(matrix: Tensor, rank: int = K, gate: int = GATE_K) -> tuple[float, float]:
    """Missed share of the energy of the exact truncation, and largest angle of the gate subspace in radians."""
    exact = torch.linalg.svd(matrix.double(), full_matrices=False)
    down = torch.linalg.qr(truncated_svd(matrix, rank).down.double().T).Q
    missed = 1 - (matrix.double() @ down).square().sum() / exact.S[:rank].square().sum()
    expected, computed = exact.Vh[:gate].T, down[:, :gate]
    residual = expected - computed @ (computed.T @ expected)
    return float(missed), float(torch.linalg.matrix_norm(residual, ord=2).asin())


def benchmark_vit(layers: int, repeats: int) -> None:
    """A vision tower with eight experts, and the accuracy of its truncations."""
    base = vit(layers)
    experts = [tuned(base, number) for number in range(8)]
    functions = {
        "ours": lambda: upscale(base, experts, gate_k=GATE_K, k=K),
        "framework": lambda: framework(copy.deepcopy(base), copy.deepcopy(experts), full=True),
        "framework, full_matrices=false": lambda: framework(copy.deepcopy(base), copy.deepcopy(experts), full=False),
    }
    functions["ours"]()
    report(f"ViT-B/32 width, {layers} layers, 8 experts", compare(functions, repeats))
    generator = torch.Generator().manual_seed(5)
    for shape in ((768, 768), (3072, 768), (768, 3072)):
        missed, angle = quality(delta(shape, generator))
        print(f"  {shape}: energy missed {missed:.1e}, gate subspace {angle:.1e} rad", flush=True)


def benchmark_large(layers: int, repeats: int) -> None:
    """One layer of a 7B language model."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4096, 4096, bias=False))
    experts = [tuned(base, number) for number in range(2)]
    functions = {
        "ours": lambda: upscale(base, experts, gate_k=GATE_K, k=K),
        "framework": lambda: framework(copy.deepcopy(base), copy.deepcopy(experts), full=True),
        "framework, full_matrices=false": lambda: framework(copy.deepcopy(base), copy.deepcopy(experts), full=False),
    }
    report("one 4096×4096 layer, 2 experts", compare(functions, repeats))
    missed, angle = quality(experts[0][0].weight.detach() - base[0].weight.detach())
    print(f"  energy missed {missed:.1e}, gate subspace {angle:.1e} rad", flush=True)


def benchmark_lora(layers: int, repeats: int) -> None:
    """Flan-T5 with eight LoRA adapters, read from files."""
    from fusion_bench.modelpool.seq2seq_lm.modelpool import load_lora_model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = T5ForConditionalGeneration(flan_t5(layers)).eval()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        base.save_pretrained(root / "base")
        folders = [root / f"lora-{number}" for number in range(8)]
        targets = ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]
        for folder in folders:
            peft = get_peft_model(copy.deepcopy(base), LoraConfig(r=16, lora_alpha=32, target_modules=targets))
            with torch.no_grad():
                for key, parameter in peft.named_parameters():
                    if "lora_B" in key:
                        parameter.normal_(std=0.02)
            peft.save_pretrained(folder)

        def of_framework() -> nn.Module:
            loaded = T5ForConditionalGeneration.from_pretrained(root / "base")
            merged = [load_lora_model(str(root / "base"), str(folder)) for folder in folders]
            return framework(loaded, merged, full=True)

        def ours() -> nn.Module:
            loaded = T5ForConditionalGeneration.from_pretrained(root / "base")
            return upscale(loaded, {f.name: f for f in folders}, gate_k=GATE_K, k=K)

        ours()
        report(
            f"Flan-T5-base width, {layers}+{layers} layers, 8 LoRA experts",
            compare({"ours": ours, "framework": of_framework}, repeats),
        )


def benchmark_memory(layers: int, repeats: int) -> None:
    """Peak memory with 8 and 20 experts, in fresh processes."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        base = vit(layers)
        base.save_pretrained(root / "base")
        for number in range(8):
            noisy = copy.deepcopy(base)
            with torch.no_grad():
                for parameter in noisy.parameters():
                    parameter += 0.002 * torch.randn_like(parameter)
            noisy.save_pretrained(root / str(number))
        for count in (8, 20):
            command = [sys.executable, __file__, "--peak", str(root), str(count)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            print(f"ViT-B/32 width, {layers} layers, {count} experts from files: {done.stdout.strip()}", flush=True)


def peak(root: Path, count: int) -> None:
    """Print the peak of the resident memory beyond the pretrained model and the result, of a fresh process."""
    small = CLIPVisionModel(CLIPVisionConfig(hidden_size=192, intermediate_size=256, num_hidden_layers=1))
    upscale(small, [tuned(small, 0), tuned(small, 1)], gate_k=GATE_K, k=K)  # warm-up: loads libraries, starts threads
    base = CLIPVisionModel.from_pretrained(root / "base")
    # a copy in memory: from_pretrained maps the file
    base.load_state_dict(copy.deepcopy(base.state_dict()), assign=True)
    gc.collect()
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which loading the model has set
    model = upscale(base, {str(i): root / str(i % 8) for i in range(count)}, gate_k=GATE_K, k=K)
    result = sum(p.nbytes for p in model.parameters()) / 1e6
    status = Path("/proc/self/status").read_text()  # the peak of getrusage includes the parent process
    above = int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6 - before - result
    print(f"result {result:.0f} MB, peak beyond it and the pretrained model {above:.0f} MB")


def resident() -> float:
    """Resident memory of this process, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def benchmark_sweep(layers: int, repeats: int) -> None:
    """A sweep over ranks with a factor cache, relative to one point."""
    base = vit(layers)
    points = [(gate_k, k) for gate_k in (1, 4, 8, 16) for k in (8, 16, 32)]
    with tempfile.TemporaryDirectory() as name:
        pool = {}
        for number in range(-1, 8):
            folder = f"{name}/{number}"
            (base if number < 0 else tuned(base, number)).save_pretrained(folder)
            pool["_pretrained_" if number < 0 else str(number)] = {
                "_target_": "transformers.CLIPVisionModel.from_pretrained", "pretrained_model_name_or_path": folder
            }  # fmt: skip

        def sweep(points: list[tuple[int, int]]) -> None:
            with tempfile.TemporaryDirectory() as cache, quiet():
                for gate_k, k in points:
                    SmileUpscalingAlgorithm(gate_k=gate_k, k=k, factor_cache=cache).run(BaseModelPool(pool))

        seconds = compare({"one point": lambda: sweep(points[-1:]), "12 points": lambda: sweep(points)}, repeats)
    ratio = seconds["12 points"] / seconds["one point"]
    print(f"sweep over gate_k and k, {layers} layers: {seconds}; 12 points take {ratio:.2f}× one", flush=True)


def benchmark_processes(layers: int, repeats: int) -> None:
    """One process and two, with one thread each."""
    for size in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_process, (size, folder, layers, repeats), nprocs=size)
            seconds = float((Path(folder) / "seconds").read_text())
        if size == 1:
            alone = seconds
    print(f"one process {alone:.2f} s, two {seconds:.2f} s, 1 thread each: {alone / seconds:.2f}× faster", flush=True)


def _process(rank: int, size: int, folder: str, layers: int, repeats: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    base = vit(layers)
    experts = [tuned(base, number) for number in range(8)]
    upscale(base, experts[:2], gate_k=GATE_K, k=K, share_work=True)
    times = []
    for _ in range(repeats):
        dist.barrier()
        times.append(timed(lambda: upscale(base, experts, gate_k=GATE_K, k=K, share_work=True)))
    if rank == 0:
        (Path(folder) / "seconds").write_text(str(statistics.median(times)))
    dist.barrier()
    dist.destroy_process_group()


def benchmark_growth(layers: int, repeats: int) -> None:
    """Time per layer and expert."""
    for depth, count in ((1, 2), (1, 4), (1, 8), (2, 4), (4, 4)):
        base = vit(depth)
        experts = [tuned(base, number) for number in range(count)]
        seconds = compare({"ours": lambda: upscale(base, experts, gate_k=GATE_K, k=K)}, repeats)["ours"]  # noqa: B023
        print(f"{depth} layers, {count} experts: {seconds:.2f} s, {seconds / depth / count:.3f} s each", flush=True)


BENCHMARKS = {
    "vit": benchmark_vit, "large": benchmark_large, "lora": benchmark_lora, "memory": benchmark_memory,
    "sweep": benchmark_sweep, "processes": benchmark_processes, "growth": benchmark_growth,
}  # fmt: skip


def main() -> None:
    """Run the benchmarks of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", nargs="*", choices=[*BENCHMARKS, []], help="(default: all)")
    parser.add_argument("--layers", type=int, default=12, help="transformer layers (default: 12)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        peak(Path(arguments.peak[0]), int(arguments.peak[1]))
        return
    for name in arguments.benchmarks or BENCHMARKS:
        BENCHMARKS[name](arguments.layers, arguments.repeats)


if __name__ == "__main__":
    main()
