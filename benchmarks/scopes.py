"""Cost of each routing scope, relative to the plain model.

    python benchmarks/scopes.py                     # a vision tower of ViT-B/32's width
    python benchmarks/scopes.py --device cuda --dtype bfloat16 --depth 12

Eight experts, gate_k=16, k=32, top_k=1, random weights and images. All models run in turn; the times are medians. The
first of two passes is a forward pass of the pretrained model, so two passes cost at least twice the plain model.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from forward import add_device, interleaved, set_up, upscaled
from transformers import CLIPVisionConfig, CLIPVisionModel

from fusion_bench_smile import choose_experts

SCOPES = {
    "token": {},
    "sequence": {"routing_scope": "sequence"},
    "global": {"routing_scope": "global"},
    "input": {"routing_scope": "input"},
    "input, merged": {"routing_scope": "input", "execution": "merged"},
}


@torch.no_grad()
def main() -> None:
    """Print the table of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device(parser)
    parser.add_argument("--depth", type=int, default=3, help="layers of the tower (default: 3)")
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8, 32, 128))
    parser.add_argument("--seconds", type=float, default=20.0, help="for each batch size (default: 20)")
    options = parser.parse_args()
    device, dtype = set_up(options)
    torch.manual_seed(0)
    base = CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=options.depth)).eval()
    models = {scope: upscaled(base, **settings).to(device, dtype) for scope, settings in SCOPES.items()}
    models = {"plain": base.to(device, dtype), **models}
    print(f"| images | experts used | plain (ms) | {' | '.join(SCOPES)} |")
    print(f"|---:|---:|---:|{'---:|' * len(SCOPES)}")
    for count in options.batches:
        pixels = torch.randn(count, 3, 224, 224, device=device, dtype=dtype)
        seconds = interleaved({n: partial(m, pixels) for n, m in models.items()}, device, options.seconds)
        ratios = [f"{seconds[scope] / seconds['plain']:.2f}×" for scope in SCOPES]
        used = int((choose_experts(models["input"], pixel_values=pixels) > 0).any(dim=0).sum())
        print(f"| {count} | {used} | {seconds['plain'] * 1e3:.1f} | {' | '.join(ratios)} |", flush=True)


if __name__ == "__main__":
    main()
