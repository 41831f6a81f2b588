"""Watching the routers."""

from __future__ import annotations

import pytest
import torch
from conftest import clip_inputs, clip_tower, experts_of, output

from fusion_bench_smile import record_routing, upscale
from fusion_bench_smile.layers import SmileLinear
from fusion_bench_smile.routing import routing_statistics


@pytest.mark.parametrize("top_k", [1, 2])
def test_it_sees_what_the_layers_do(top_k):
    base = clip_tower()
    model = upscale(base, experts_of(base), k=4, gate_k=2, top_k=top_k)
    x = clip_inputs()
    plain = output(model, x)
    with record_routing(model) as routing:
        assert torch.equal(output(model, x), plain)
        output(model, x)
    assert set(routing) == {name for name, m in model.named_modules() if isinstance(m, SmileLinear)}
    for layer in routing.values():
        assert len(layer.scores) == len(layer.choices) == len(layer.weights) == 2
        scores, choices = layer.scores[0], layer.choices[0]
        assert scores.shape[-1] == 3
        assert torch.equal(choices, scores.topk(top_k).indices)
        assert layer.loads.shape == (3,)
        torch.testing.assert_close(layer.loads.sum(), torch.ones(()))
    if top_k == 1:
        counts = sum(torch.bincount(choices.flatten(), minlength=3) for choices in layer.choices)
        torch.testing.assert_close(layer.loads, counts / counts.sum())


def test_afterwards_nobody_watches():
    base = clip_tower()
    model = upscale(base, experts_of(base), k=4, gate_k=2)
    with pytest.raises(RuntimeError, match="stopped"), record_routing(model) as routing:
        raise RuntimeError("stopped")
    output(model, clip_inputs())
    assert not any(layer.scores for layer in routing.values())
    assert not any("_scores" in vars(m) for m in model.modules())


def test_an_expert_that_changed_nothing_gets_no_tokens():
    base = clip_tower()
    model = upscale(base, [*experts_of(base, 2), base], k=4, gate_k=2)
    with record_routing(model) as routing:
        output(model, clip_inputs())
    assert all(layer.loads[2] == 0 for layer in routing.values())


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("execution", ["grouped", "masked"])
def test_the_statistics_are_those_of_the_record(top_k, execution):
    base = clip_tower()
    model = upscale(base, experts_of(base), k=4, gate_k=2, top_k=top_k, execution=execution)
    batches = clip_inputs(), clip_inputs()
    with record_routing(model) as routing, routing_statistics(model) as statistics:
        for batch in batches:
            output(model, batch)
    for name, layer in routing.items():
        assert layer.scores[0].shape[0] == len(batches[0]["pixel_values"])  # as the layer was given them
        assert layer.scores[0].shape[:-1] == layer.choices[0].shape[:-1]
        assert layer.scores[0].ndim == 3
        torch.testing.assert_close(torch.tensor(statistics[name].load), layer.loads)
        scores = torch.cat([each.flatten(0, -2) for each in layer.scores]).double()
        shares = scores.softmax(-1)
        entropy = -(shares * shares.log()).sum(-1).mean() / torch.tensor(3.0).log()
        assert statistics[name].entropy == pytest.approx(entropy.item(), abs=1e-5)
        assert statistics[name].tokens == len(scores)
