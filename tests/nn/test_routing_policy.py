"""The policies of the routing scopes on states that are made by hand."""

from __future__ import annotations

import torch
from layers import UNIFORM, random_layer

from fusion_bench_smile import SmileConfig
from fusion_bench_smile.nn import Prototypes, router_scores
from fusion_bench_smile.nn.routing_policy import choose_for_all_layers, choose_in_layer, group_by_expert, observe_layer
from fusion_bench_smile.nn.routing_state import RoutingState

TWO_PASS = SmileConfig(routing_scope="two_pass")


def test_inputs_are_grouped_by_the_experts_that_serve_them():
    weights = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.3, 0.7], [0.0, 0.0, 0.0]])
    groups = group_by_expert(weights)
    assert groups.num_inputs == 3
    assert [(expert, inputs.tolist()) for expert, inputs in groups.members] == [(1, [0, 1]), (2, [1])]


def test_the_choice_of_a_layer_is_kept_until_the_next_inputs():
    layer, config = random_layer(UNIFORM, 6, 5), SmileConfig(routing_scope="sequence")
    layer.smile_config = config
    state, x = RoutingState(num_inputs=2), torch.randn(2, 4, 6, dtype=torch.float64)
    first = choose_in_layer(state, config, UNIFORM.num_experts, layer, x, layer(x))
    scores = router_scores(layer, x).mean(dim=1)
    torch.testing.assert_close(state.scores, scores)
    assert torch.equal(first.argmax(-1), scores.argmax(-1))
    other = torch.randn(2, 4, 6, dtype=torch.float64)
    assert choose_in_layer(state, config, UNIFORM.num_experts, layer, other, layer(other)) is first


def test_the_first_pass_averages_the_scores_of_its_layers():
    layers = [random_layer(UNIFORM, 6, 5) for _ in range(2)]
    state, x = RoutingState(num_inputs=2, in_first_pass=True), torch.randn(2, 4, 6, dtype=torch.float64)
    for layer in layers:
        observe_layer(state, TWO_PASS, layer, x, layer(x))
    expected = torch.stack([router_scores(layer, x).mean(dim=1) for layer in layers]).mean(dim=0)
    torch.testing.assert_close(state.scores, expected)


def test_without_a_router_all_experts_score_the_same():
    state = RoutingState(num_inputs=2)
    choose_for_all_layers(state, TWO_PASS, 3, None, None)
    assert torch.equal(state.scores, torch.zeros(2, 3))
    assert state.choice.sum() == 2


def test_a_baseline_standardises_the_scores():
    state = RoutingState(num_inputs=1, scores=torch.tensor([[3.0, 5.0]]))
    choose_for_all_layers(state, TWO_PASS, 2, None, torch.tensor([[1.0, 4.0], [0.5, 1.0]]))
    assert torch.equal(state.scores, torch.tensor([[4.0, 1.0]]))
    assert torch.equal(state.choice, torch.tensor([[1.0, 0.0]]))


def test_unknown_inputs_get_no_expert():
    features = [torch.randn(8, 4) + 10 * task for task in range(2)]
    prototypes = Prototypes.fit(features)
    config = SmileConfig(routing_scope="two_pass", refuse_unknown=True)
    state = RoutingState(num_inputs=2, features=[torch.stack([features[1][0], torch.full((4,), 1000.0)])])
    choose_for_all_layers(state, config, 2, prototypes, None)
    assert state.choice[0].tolist() == [0.0, 1.0]
    assert state.choice[1].tolist() == [0.0, 0.0]
