"""Parameters of upscaled models in the framework's layout and in this library's, counted on the meta device.

    python benchmarks/parameters.py        # Mistral-7B (the paper's table), ViT-B/32, Flan-T5-base

The framework stores separate router weights in every layer, also for one expert. Here the router is the first rows of
the experts' factors, and a single expert needs no router. Biases are not counted, as in the paper. The report is
Markdown.
"""

from __future__ import annotations

import torch
from construction import flan_t5
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    MistralConfig,
    MistralForCausalLM,
    T5ForConditionalGeneration,
)

from fusion_bench_smile.config import SmileConfig
from fusion_bench_smile.construction import make_plan

# (experts, gate_k, k) of each row
MISTRAL = [(1, 8, 8), (1, 8, 16), (1, 8, 32), (1, 8, 64), (1, 8, 128), (1, 8, 256), (1, 8, 512), (3, 8, 8), (3, 8, 512)]
SMALLER = [(8, 4, 16), (8, 16, 32), (8, 8, 8)]


def models() -> dict[str, tuple[nn.Module, list[str], list[tuple[int, int, int]]]]:
    """Each model without weights, its excluded layers, and the rows of its table."""
    with torch.device("meta"):
        return {
            "Mistral-7B": (MistralForCausalLM(MistralConfig()), ["lm_head"], MISTRAL),
            "CLIP ViT-B/32": (CLIPVisionModel(CLIPVisionConfig()), [], SMALLER),
            "Flan-T5-base": (T5ForConditionalGeneration(flan_t5(12)), ["lm_head"], SMALLER),
        }


def counts(model: nn.Module, excluded: list[str], experts: int, gate_k: int, k: int) -> tuple[int, int, int]:
    """Parameters of the pretrained model, of the framework's upscaled model, and of this library's."""
    plan = make_plan(model, experts, SmileConfig(gate_k=gate_k, k=k, exclude_modules=excluded))
    framework = experts * sum(
        layer.k * (layer.in_features + layer.out_features) + layer.gate_k * layer.in_features for layer in plan.layers
    )
    ours = sum(layer.max_added([None] * experts) for layer in plan.layers)
    return plan.parameters, plan.parameters + framework, plan.parameters + ours


def main() -> None:
    """Print the table."""
    print("| model | experts | gate_k | k | pretrained | framework | ratio | ours | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name, (model, excluded, rows) in models().items():
        for experts, gate_k, k in rows:
            base, framework, ours = counts(model, excluded, experts, gate_k, k)
            ratios = f"{framework:,} | {framework / base:.3f} | {ours:,} | {ours / base:.3f}"
            print(f"| {name} | {experts} | {gate_k} | {k} | {base:,} | {ratios} |")


if __name__ == "__main__":
    main()
