"""The mean over the tokens of each input, and the scores of several layers."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import experts_of, output
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from fusion_bench_smile import choose_experts, record_choices, upscale
from fusion_bench_smile.nn import MIN_ENERGY_SHARE, RoutingState, mean_over_tokens
from fusion_bench_smile.nn.routing_state import log_energy_share, repeat_for_rows

SCOPES = ("token", "input")


def bert(layers: int) -> nn.Module:
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=48
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


def mean_in_loops(values: Tensor, num_inputs: int, mask: Tensor | None) -> Tensor:
    """The mean over the beams of an input of the means over the tokens of a beam, in float64."""
    beams = len(values) // num_inputs
    means = []
    for number in range(num_inputs):
        beam_means = []
        for beam in range(beams):
            tokens = values[number * beams + beam].double()
            kept = [token for i, token in enumerate(tokens) if mask is None or mask[number, i]]
            beam_means.append(sum(kept, torch.zeros(values.shape[-1], dtype=torch.double)) / max(len(kept), 1))
        means.append(sum(beam_means) / beams)
    return torch.stack(means)


@given(
    inputs=st.integers(1, 4),
    beams=st.integers(1, 3),
    tokens=st.integers(1, 5),
    masked=st.booleans(),
    seed=st.integers(),
)
@settings(max_examples=80, deadline=None)
def test_the_mean_over_tokens_is_that_of_loops(inputs, beams, tokens, masked, seed):
    generator = torch.Generator().manual_seed(seed % 2**32)
    values = torch.randn(inputs * beams, tokens, 3, generator=generator)
    mask = torch.rand(inputs, tokens, generator=generator) < 0.6 if masked else None
    expected = mean_in_loops(values, inputs, mask)
    torch.testing.assert_close(mean_over_tokens(values, inputs, mask).double(), expected, rtol=1e-5, atol=1e-6)
    state = RoutingState(num_inputs=inputs, mask=mask)
    assert torch.equal(state.mean_over_tokens(values), mean_over_tokens(values, inputs, mask))


def test_tokens_may_have_several_dimensions_or_be_flattened():
    values, mask = torch.randn(2, 3, 4, 5), torch.tensor([[True, True, False], [True, False, False]])
    torch.testing.assert_close(mean_over_tokens(values, 2, None), values.mean(dim=(1, 2)))
    flat = torch.randn(2, 3, 5)
    torch.testing.assert_close(mean_over_tokens(flat.flatten(0, 1), 2, mask), mean_over_tokens(flat, 2, mask))


def test_a_mask_of_another_length_is_not_used():
    values, mask = torch.randn(2, 4, 5), torch.tensor([[True, True, False], [True, False, False]])
    torch.testing.assert_close(mean_over_tokens(values, 2, mask), values.mean(dim=1))


def test_rows_that_are_not_of_all_inputs_are_refused():
    with pytest.raises(RuntimeError, match=r"^leading dimension 5 is not a multiple of the batch size 2$"):
        mean_over_tokens(torch.randn(5, 3, 4), 2, None)
    with pytest.raises(RuntimeError, match=r"^leading dimension 5 is not a multiple of the batch size 2$"):
        repeat_for_rows(torch.randn(2, 3), 5)


def test_values_are_repeated_for_the_beams_of_each_input():
    values = torch.tensor([[1.0], [2.0]])
    assert repeat_for_rows(values, 6)[:, 0].tolist() == [1, 1, 1, 2, 2, 2]
    assert repeat_for_rows(values, 2) is values


def test_shares_of_energy_are_bounded_below():
    shares = torch.tensor([0.0, MIN_ENERGY_SHARE / 2, 0.25, 1.0])
    expected = [math.log(MIN_ENERGY_SHARE), math.log(MIN_ENERGY_SHARE), math.log(0.25), 0.0]
    assert log_energy_share(shares).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("scope", SCOPES)
def test_padding_does_not_count(scope: str) -> None:
    base = bert(2)
    model = upscale(base, experts_of(base), k=8, gate_k=4, top_k=2, routing_scope=scope)
    ids = torch.randint(1, 50, (3, 7))
    plain = output(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    padded = torch.cat([ids, torch.randint(1, 50, (3, 5))], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(3, 5, dtype=torch.long)], dim=1)
    longer = output(model, {"input_ids": padded, "attention_mask": mask})[:, :7]
    torch.testing.assert_close(longer, plain, atol=1e-5, rtol=1e-5)
    if scope == "input":
        chosen = choose_experts(model, input_ids=ids)
        torch.testing.assert_close(choose_experts(model, input_ids=padded, attention_mask=mask), chosen)


def test_padding_does_count_without_a_mask() -> None:
    """The counterpart: if the mask was not used above, other tokens would change the scores."""
    base = bert(1)
    model = upscale(base, experts_of(base), k=8, gate_k=4, routing_scope="input")
    ids = torch.randint(1, 50, (3, 7))
    with record_choices(model) as calls:
        output(model, {"input_ids": ids})
        output(model, {"input_ids": torch.cat([ids, torch.randint(1, 50, (3, 5))], dim=1)})
    assert not torch.allclose(calls[1].scores, calls[0].scores, atol=1e-6)
