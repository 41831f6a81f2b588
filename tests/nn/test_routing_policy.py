"""The policy of routing whole inputs on states that are made by hand."""

from __future__ import annotations

import torch
from layers import UNIFORM, random_layer

from fusion_bench_smile import SmileConfig
from fusion_bench_smile.nn import MIN_ENERGY_SHARE, ExpertLayout, Prototypes, energy_shares, routing_features
from fusion_bench_smile.nn.routing_policy import SHARPNESS, choose_for_all_layers, observe_layer
from fusion_bench_smile.nn.routing_state import RoutingState

INPUT = SmileConfig(routing_scope="input", top_k=2)


def test_inputs_are_grouped_by_the_experts_that_serve_them():
    weights = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.3, 0.7], [0.0, 0.0, 0.0]])
    groups = RoutingState(num_inputs=3).group_inputs(weights)
    assert groups.num_inputs == 3
    assert [(expert, inputs.tolist()) for expert, inputs in groups.members] == [(1, [0, 1]), (2, [1])]


def test_the_experts_of_an_input_are_those_with_a_weight():
    weights = torch.tensor([[0.0, 1.0, 0.0], [-0.3, 0.0, 0.7]])
    state = RoutingState(num_inputs=2, num_served=2)
    experts, shares = state.served_inputs(weights)
    assert torch.equal(torch.zeros(2, 3).scatter(1, experts, shares), weights)
    assert state.served_inputs(weights)[0] is experts  # once for all layers
    beams = state.served_inputs(weights.repeat_interleave(2, 0))
    assert torch.equal(beams[1], shares.repeat_interleave(2, 0))


def test_scores_are_how_far_experts_are_behind_in_deviations_over_the_layers():
    layers = [random_layer(UNIFORM, 6, 5) for _ in range(4)]
    state, x = RoutingState(num_inputs=2, in_first_pass=True), torch.randn(2, 4, 6, dtype=torch.float64)
    for layer in layers:
        observe_layer(state, layer, x)
    choose_for_all_layers(state, INPUT, 3, None)
    shares = torch.stack([energy_shares(layer, x).mean(dim=1).log() for layer in layers])  # (layers, inputs, experts)
    for row in range(2):
        best = shares[:, row].mean(dim=0).argmax()
        behind = shares[:, row, best, None] - shares[:, row]
        others = [expert for expert in range(3) if expert != best]
        expected = -SHARPNESS * (behind.mean(dim=0) / behind.std(dim=0, correction=0))[others]
        torch.testing.assert_close(state.scores[row, others].double(), expected, atol=1e-5, rtol=1e-4)
        assert state.scores[row, best] == 0
    kept = state.scores.topk(2)
    torch.testing.assert_close(state.choice.gather(1, kept.indices), kept.values.softmax(-1))
    torch.testing.assert_close(state.choice.sum(-1), torch.ones(2))


def test_inputs_without_energy_have_the_same_score_for_all_experts():
    layers = [random_layer(UNIFORM, 6, 5) for _ in range(4)]
    state, x = RoutingState(num_inputs=1, in_first_pass=True), torch.zeros(1, 4, 6, dtype=torch.float64)
    for layer in layers:
        observe_layer(state, layer, x)
    assert torch.equal(torch.stack(state.features).exp(), torch.full((4, 1, 3), MIN_ENERGY_SHARE).log().exp())
    choose_for_all_layers(state, INPUT, 3, None)
    assert torch.equal(state.scores, torch.zeros(1, 3))


def test_layers_without_a_router_do_not_count():
    layer = random_layer(ExpertLayout(ranks=(2, 2), gate_ranks=(0, 0)), 6, 5)
    state = RoutingState(num_inputs=2, in_first_pass=True)
    observe_layer(state, layer, torch.randn(2, 4, 6, dtype=torch.float64))
    assert state.features == []
    choose_for_all_layers(state, INPUT, 2, None)
    assert torch.equal(state.scores, torch.zeros(2, 2))
    torch.testing.assert_close(state.choice, torch.full((2, 2), 0.5))


def test_features_for_prototypes_make_no_choice():
    layer, x = random_layer(UNIFORM, 6, 5), torch.randn(2, 4, 6, dtype=torch.float64)
    state = RoutingState(num_inputs=2, in_first_pass=True, collects_features=True)
    observe_layer(state, layer, x)
    torch.testing.assert_close(state.input_features, routing_features(layer, x).mean(dim=1).log().float())
    choose_for_all_layers(state, INPUT, 3, None)
    assert state.scores is None
    assert state.choice is None


def test_unknown_inputs_get_no_expert():
    features = [torch.randn(8, 4) + 10 * task for task in range(2)]
    prototypes = Prototypes.fit(features)
    config = SmileConfig(routing_scope="input", refuse_unknown=True)
    inputs = torch.stack([features[1][0], torch.full((4,), 1000.0)])
    state = RoutingState(num_inputs=2, collects_features=True, features=[inputs])
    choose_for_all_layers(state, config, 2, prototypes)
    assert state.choice[0].tolist() == [0.0, 1.0]
    assert state.choice[1].tolist() == [0.0, 0.0]
