"""Parameter counts on the meta device: the paper's, and those of models that are built."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import clip_tower, experts_of, t5
from parity import upscale_by_framework

from fusion_bench_smile import upscale
from fusion_bench_smile.nn import count_parameters

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from parameters import counts, models

PAPER = {  # Mistral-7B (arXiv 2408.10174): (experts, gate_k, k) → parameters
    (1, 8, 8): 7_272_665_088,
    (1, 8, 512): 8_593_870_848,
    (3, 8, 8): 7_334_531_072,
    (3, 8, 512): 11_298_148_352,
}


def test_the_papers_mistral_table():
    model, excluded, rows = models()["Mistral-7B"]
    assert PAPER.keys() <= set(rows)
    for row, expected in PAPER.items():
        pretrained, by_framework, by_plugin = counts(model, excluded, *row)
        assert (pretrained, by_framework) == (7_241_732_096, expected)
        assert pretrained < by_plugin < by_framework


@pytest.mark.parametrize("make", [clip_tower, t5])
@pytest.mark.parametrize(("experts", "gate_k", "k"), [(1, 2, 4), (1, 4, 2), (3, 2, 4), (3, 4, 2)])
def test_the_counts_are_those_of_built_models(make, experts, gate_k, k):
    base = make()
    tuned = experts_of(base, experts)
    _, by_framework, by_plugin = counts(base, [], experts, gate_k, k)

    def weights(model) -> int:
        """The number of parameters without the biases of experts."""
        layers = [module for module in model.modules() if hasattr(module, "layout") and module.expert_bias is not None]
        biases = sum(layer.expert_bias.numel() for layer in layers)
        for module in model.modules():
            if type(module).__name__ == "SmileCompressedLinear":
                biases += 0 if module.bias is None else module.bias.numel()
        return count_parameters(model) - biases

    assert weights(upscale(base, tuned, gate_k=gate_k, k=k)) == by_plugin
    assert weights(upscale_by_framework(base, tuned, gate_k=gate_k, k=k)) == by_framework
