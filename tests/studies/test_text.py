"""The study of the text benchmark."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusion_bench_smile import upscale
from fusion_bench_smile.nn import observe_routing, routed_layers
from smile_zoo.text import TASKS, load_expert, load_pretrained, load_tokenizer
from smile_zoo.text.task_pool import tokenize_batch
from studies.text import RANKS, router_statistics


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    return load_pretrained().eval()


def test_router_statistics_of_a_sure_case(encoder):
    """Only one expert differs from the pretrained model: it gets every token of all tasks."""
    other = load_expert("bible")
    experts = {task: other if task == "bible" else encoder for task in TASKS}
    model = upscale(encoder, experts, gate_k=4, k=4).eval()
    statistics = router_statistics(model, texts=5)
    assert statistics["router accuracy"] == pytest.approx(100 / len(TASKS))
    assert statistics["largest load"] == 100
    observed: list[str] = []
    with observe_routing(model, lambda name, event: observed.append(name)), torch.inference_mode():
        model(**tokenize_batch(load_tokenizer(), ["a fox"]))
    assert len(observed) == len(routed_layers(model)) == 36
    assert (8, 8) in RANKS
