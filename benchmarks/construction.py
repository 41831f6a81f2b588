"""What building a SMILE model costs, against the framework's own SMILE in the same run, as ratios.

    python benchmarks/construction.py                      # everything, as quoted: more than an hour on two cores
    python benchmarks/construction.py --layers 2 vit lora  # a slice: 2 instead of 12 transformer layers, two figures

Random models of the real shapes; the deltas have a decaying spectrum plus noise. Both sides work on the same weights,
one after the other, in alternating order, after a warm-up; the ratios are of medians.
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
from fusion_bench_smile.factors import truncated_svd

GATE_K, K = 16, 32


def vit(layers: int) -> nn.Module:
    torch.manual_seed(0)
    return CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=layers)).eval()


def flan_t5(layers: int) -> T5Config:
    """Flan-T5-base, with so many layers on each side."""
    return T5Config(
        vocab_size=32128, d_model=768, d_kv=64, d_ff=2048, num_layers=layers, num_decoder_layers=layers, num_heads=12,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip


def delta(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A task vector like a real one: singular values that fall as a power, on a floor of noise."""
    directions = min(256, *shape)
    left = torch.linalg.qr(torch.randn(shape[0], directions, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(shape[1], directions, generator=generator)).Q
    values = torch.arange(1, directions + 1) ** -0.7
    noise = torch.randn(shape, generator=generator) * (0.1 / max(shape) ** 0.5)
    return 0.05 * (left * values @ right.T + noise)


@torch.no_grad()
def tuned(base: nn.Module, number: int) -> nn.Module:
    generator = torch.Generator().manual_seed(number + 1)
    expert = copy.deepcopy(base)
    for module in expert.modules():
        if isinstance(module, nn.Linear):
            module.weight += delta(tuple(module.weight.shape), generator)  # type: ignore[arg-type]
    return expert


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def framework(base: nn.Module, experts: list[nn.Module], full: bool) -> nn.Module:
    """The framework's SMILE; it modifies what it gets, so that copying is no part of the time."""
    from fusion_bench.method import SmileUpscalingAlgorithm

    with quiet():
        method = SmileUpscalingAlgorithm(
            device="cpu", upscaling_accelerator=None, full_matrices=full, gate_k=GATE_K, k=K, top_k=1
        )
        return method.merge(base, experts)


def timed(function: Callable[[], object], prepare: Callable[[], None] = lambda: None) -> float:
    prepare()
    gc.collect()
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def compare(sides: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each side, in alternating order."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name in list(sides) if repeat % 2 == 0 else list(reversed(sides)):
            times[name].append(timed(sides[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def report(title: str, seconds: Mapping[str, float], ours: str = "ours") -> None:
    parts = [f"{name} {value:.2f} s" for name, value in seconds.items()]
    ratios = [f"{value / seconds[ours]:.1f}× {name}" for name, value in seconds.items() if name != ours]
    print(f"{title}: {', '.join(parts)}; faster by {', '.join(ratios)}", flush=True)


def quality(matrix: Tensor, rank: int = K, gate: int = GATE_K) -> tuple[float, float]:
    """Missed part of the best captured energy, and the largest angle in radians of the gate subspace."""
    exact = torch.linalg.svd(matrix.double(), full_matrices=False)
    down = torch.linalg.qr(truncated_svd(matrix, rank).down.double().T).Q
    missed = 1 - (matrix.double() @ down).square().sum() / exact.S[:rank].square().sum()
    wanted, got = exact.Vh[:gate].T, down[:, :gate]
    return float(missed), float(torch.linalg.matrix_norm(wanted - got @ (got.T @ wanted), ord=2).asin())


def figure_vit(layers: int, repeats: int) -> None:
    base = vit(layers)
    experts = [tuned(base, number) for number in range(8)]
    sides = {
        "ours": lambda: upscale(base, experts, gate_k=GATE_K, k=K),
        "framework": lambda: framework(copy.deepcopy(base), copy.deepcopy(experts), full=True),
        "framework, full_matrices=false": lambda: framework(copy.deepcopy(base), copy.deepcopy(experts), full=False),
    }
    sides["ours"]()
    report(f"ViT-B/32 width, {layers} layers, 8 experts", compare(sides, repeats))
    generator = torch.Generator().manual_seed(5)
    for shape in ((768, 768), (3072, 768), (768, 3072)):
        missed, angle = quality(delta(shape, generator))
        print(f"  {shape}: energy missed {missed:.1e}, gate subspace {angle:.1e} rad", flush=True)


def figure_large(layers: int, repeats: int) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4096, 4096, bias=False))
    experts = [tuned(base, number) for number in range(2)]
    sides = {
        "ours": lambda: upscale(base, experts, gate_k=GATE_K, k=K),
        "framework": lambda: framework(copy.deepcopy(base), copy.deepcopy(experts), full=True),
        "framework, full_matrices=false": lambda: framework(copy.deepcopy(base), copy.deepcopy(experts), full=False),
    }
    report("one 4096×4096 layer, 2 experts", compare(sides, repeats))
    missed, angle = quality(experts[0][0].weight.detach() - base[0].weight.detach())
    print(f"  energy missed {missed:.1e}, gate subspace {angle:.1e} rad", flush=True)


def figure_lora(layers: int, repeats: int) -> None:
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

        def theirs() -> nn.Module:
            loaded = T5ForConditionalGeneration.from_pretrained(root / "base")
            merged = [load_lora_model(str(root / "base"), str(folder)) for folder in folders]
            return framework(loaded, merged, full=True)

        def ours() -> nn.Module:
            loaded = T5ForConditionalGeneration.from_pretrained(root / "base")
            return upscale(loaded, {f.name: f for f in folders}, gate_k=GATE_K, k=K)

        ours()
        report(
            f"Flan-T5-base width, {layers}+{layers} layers, 8 LoRA experts",
            compare({"ours": ours, "framework": theirs}, repeats),
        )


def figure_memory(layers: int, repeats: int) -> None:
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
    """Run in a process of its own: the peak of the resident size beyond the pretrained model and the result."""
    small = CLIPVisionModel(CLIPVisionConfig(hidden_size=192, intermediate_size=256, num_hidden_layers=1))
    upscale(small, [tuned(small, 0), tuned(small, 1)], gate_k=GATE_K, k=K)  # libraries load, threads start
    base = CLIPVisionModel.from_pretrained(root / "base")
    base.load_state_dict(copy.deepcopy(base.state_dict()), assign=True)  # in memory, no longer a map of its file
    gc.collect()
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of loading the pretrained model, is forgotten
    model = upscale(base, {str(i): root / str(i % 8) for i in range(count)}, gate_k=GATE_K, k=K)
    result = sum(p.nbytes for p in model.parameters()) / 1e6
    status = Path("/proc/self/status").read_text()  # unlike getrusage's, its peak begins with this program
    above = int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6 - before - result
    print(f"result {result:.0f} MB, peak beyond it and the pretrained model {above:.0f} MB")


def resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def figure_sweep(layers: int, repeats: int) -> None:
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
            with tempfile.TemporaryDirectory() as store, quiet():
                for gate_k, k in points:
                    SmileUpscalingAlgorithm(gate_k=gate_k, k=k, factor_cache=store).run(BaseModelPool(pool))

        seconds = compare({"one point": lambda: sweep(points[-1:]), "12 points": lambda: sweep(points)}, repeats)
    ratio = seconds["12 points"] / seconds["one point"]
    print(f"sweep over gate_k and k, {layers} layers: {seconds}; 12 points cost {ratio:.2f}× one", flush=True)


def figure_processes(layers: int, repeats: int) -> None:
    for size in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_share, (size, folder, layers, repeats), nprocs=size)
            seconds = float((Path(folder) / "seconds").read_text())
        if size == 1:
            alone = seconds
    print(f"one process {alone:.2f} s, two {seconds:.2f} s, 1 thread each: {alone / seconds:.2f}× faster", flush=True)


def _share(rank: int, size: int, folder: str, layers: int, repeats: int) -> None:
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


def figure_growth(layers: int, repeats: int) -> None:
    for depth, count in ((1, 2), (1, 4), (1, 8), (2, 4), (4, 4)):
        base = vit(depth)
        experts = [tuned(base, number) for number in range(count)]
        seconds = compare({"ours": lambda: upscale(base, experts, gate_k=GATE_K, k=K)}, repeats)["ours"]  # noqa: B023
        print(f"{depth} layers, {count} experts: {seconds:.2f} s, {seconds / depth / count:.3f} s each", flush=True)


FIGURES = {
    "vit": figure_vit, "large": figure_large, "lora": figure_lora, "memory": figure_memory, "sweep": figure_sweep,
    "processes": figure_processes, "growth": figure_growth,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", choices=[*FIGURES, []], help="which figures (default: all)")
    parser.add_argument("--layers", type=int, default=12, help="transformer layers (default: 12)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        peak(Path(arguments.peak[0]), int(arguments.peak[1]))
        return
    for name in arguments.figures or FIGURES:
        FIGURES[name](arguments.layers, arguments.repeats)


if __name__ == "__main__":
    main()
