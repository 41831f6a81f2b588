"""Recording of the routing, and oracle routing."""

from __future__ import annotations

import pytest
import torch
from conftest import clip_inputs, clip_tower, experts_of, output
from torch import nn

from fusion_bench_smile import ConfigError, PlanError, as_expert, record_choices, record_routing, upscale
from fusion_bench_smile.nn import (
    RoutingEvent,
    SmileLinear,
    observe_routing,
    routing_statistics,
    weight_by_expert,
)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_record_is_what_the_layers_do(top_k):
    base = clip_tower()
    model = upscale(base, experts_of(base), k=4, gate_k=2, top_k=top_k)
    x = clip_inputs()
    plain = output(model, x)
    with record_routing(model) as routing:
        assert torch.equal(output(model, x), plain)
        output(model, x)
    assert set(routing) == {name for name, m in model.named_modules() if isinstance(m, SmileLinear)}
    for layer in routing.values():
        assert len(layer.scores) == len(layer.experts) == len(layer.weights) == 2
        scores, experts = layer.scores[0], layer.experts[0]
        assert scores.shape[-1] == 3
        assert torch.equal(experts, scores.topk(top_k).indices)
        assert layer.loads.shape == (3,)
        torch.testing.assert_close(layer.loads.sum(), torch.ones(()))
    if top_k == 1:
        counts = sum(torch.bincount(experts.flatten(), minlength=3) for experts in layer.experts)
        torch.testing.assert_close(layer.loads, counts / counts.sum())


def test_nothing_is_recorded_after_the_block():
    base = clip_tower()
    model = upscale(base, experts_of(base), k=4, gate_k=2)
    with pytest.raises(RuntimeError, match="stopped"), record_routing(model) as routing:
        raise RuntimeError("stopped")
    output(model, clip_inputs())
    assert not any(layer.scores for layer in routing.values())


def test_observers_are_independent():
    base = clip_tower()
    model = upscale(base, experts_of(base), k=4, gate_k=2)
    events: list[tuple[str, RoutingEvent]] = []
    with record_routing(model) as outer:
        with observe_routing(model, lambda name, event: events.append((name, event))):
            output(model, clip_inputs())
        output(model, clip_inputs())
    assert {name for name, _ in events} == set(outer)
    assert len(events) == len(outer)
    assert all(len(layer.scores) == 2 for layer in outer.values())
    assert all(torch.equal(event.scores, outer[name].scores[0]) for name, event in events)
    assert all(event.inputs.shape[:-1] == event.scores.shape[:-1] for _, event in events)


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
        assert layer.scores[0].shape[0] == len(batches[0]["pixel_values"])  # the leading dimensions of the input
        assert layer.scores[0].shape[:-1] == layer.experts[0].shape[:-1]
        assert layer.scores[0].ndim == 3
        torch.testing.assert_close(torch.tensor(statistics[name].load), layer.loads)
        scores = torch.cat([each.flatten(0, -2) for each in layer.scores]).double()
        probabilities = scores.softmax(-1)
        entropy = -(probabilities * probabilities.log()).sum(-1).mean() / torch.tensor(3.0).log()
        assert statistics[name].entropy == pytest.approx(entropy.item(), abs=1e-5)
        assert statistics[name].tokens == len(scores)


def test_weight_by_expert_sums_over_all_tokens():
    experts, weights = torch.tensor([[0, 2], [2, 1]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    assert weight_by_expert(torch.zeros(2, 4), experts, weights).tolist() == [0.75, 0.5, 0.75, 0.0]


def test_the_record_of_a_choice_for_whole_inputs_is_that_choice():
    base = clip_tower()
    model = upscale(base, experts_of(base), k=4, gate_k=2, routing_scope="input")
    with record_routing(model) as routing, record_choices(model) as calls:
        output(model, clip_inputs())
    expected = calls[0].choice.argmax(-1)
    assert calls[0].served_by == [str(expert) for expert in expected.tolist()]
    assert routing
    assert all(torch.equal(layer.experts[0][:, 0], expected) for layer in routing.values())


def test_an_expert_by_name_is_that_expert():
    base = clip_tower()
    experts = dict(zip("abc", experts_of(base), strict=True))
    model = upscale(base, experts, k=32, gate_k=2, routing_scope="input")
    inputs = clip_inputs()
    routed = output(model, inputs)
    alone = upscale(base, {"b": experts["b"]}, k=32)
    with as_expert(model, "b"):
        forced = output(model, inputs)
    torch.testing.assert_close(forced, output(alone, inputs), atol=1e-4, rtol=1e-4)
    assert torch.equal(output(model, inputs), routed)
    with pytest.raises(PlanError, match="the experts are: a, b, c"), as_expert(model, "d"):
        pass


def test_oracle_routing_needs_a_router_for_whole_inputs():
    base = clip_tower()
    with pytest.raises(ConfigError, match="routing_scope"), as_expert(upscale(base, experts_of(base), k=4), "0"):
        pass
    with pytest.raises(ConfigError, match="routing_scope"), as_expert(base, "0"):
        pass


def test_layers_that_are_not_called_are_named(caplog):
    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    base = Partial()
    model = upscale(base, experts_of(base), k=4, gate_k=2)
    with routing_statistics(model):
        model(torch.randn(3, 8))
    assert "1 of 2 routed layers were not called, and their experts had no effect (first: unused)" in caplog.text
