"""One choice of experts for a whole input: what it rests on, that inputs are independent, and how long it is kept."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from conftest import ARCHITECTURES, clip_inputs, clip_tower, experts_of, output, perturbed, t5, tied_llama
from torch import Tensor, nn
from transformers import LlamaForCausalLM, T5ForConditionalGeneration

from fusion_bench_smile import (
    as_expert,
    choose_experts,
    load,
    record_choices,
    record_routing,
    save,
    upscale,
    use_experts,
)
from fusion_bench_smile.nn import RoutedLayer, RoutingState, router_of, router_scores

SCOPES = ("sequence", "global", "two_pass")
SCORES = ("norm", "weighted", "relative", "dual", "output")


def choice_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The choice in a call of the model."""
    with record_choices(model) as calls:
        output(model, inputs)
    assert calls[-1].choice is not None
    return calls[-1].choice


@pytest.fixture(scope="module")
def tower() -> nn.Module:
    torch.manual_seed(0)
    return clip_tower()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_inputs_of_a_batch_are_routed_independently(tower: nn.Module, scope: str, score: str, top_k: int) -> None:
    model = upscale(
        tower, experts_of(tower), k=8, gate_k=4, top_k=top_k, routing_scope=scope, routing_score=score,
    )  # fmt: skip
    images = torch.cat([scale * torch.randn(4, 3, 28, 28) for scale in (0.1, 1.0, 3.0)])
    together = output(model, {"pixel_values": images})
    order = torch.randperm(len(images))
    torch.testing.assert_close(output(model, {"pixel_values": images[order]}), together[order])
    alone = torch.cat([output(model, {"pixel_values": image[None]}) for image in images])
    torch.testing.assert_close(alone, together)


@pytest.mark.parametrize("execution", ["grouped", "masked"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_two_pass_adds_the_deltas_of_the_chosen_experts(tower: nn.Module, execution: str, top_k: int) -> None:
    experts = experts_of(tower)
    model = upscale(
        tower, experts, k=8, gate_k=4, top_k=top_k, routing_scope="two_pass", execution=execution, routing_score="norm"
    ).double()
    inputs = {"pixel_values": torch.randn(5, 3, 28, 28, dtype=torch.float64)}
    result = output(model, inputs)
    for row, weights in enumerate(choice_of(model, inputs)):
        assert int((weights > 0).sum()) == top_k
        assert weights.sum() == pytest.approx(1)
        merged = copy.deepcopy(tower).double()
        for name, layer in model.named_modules():
            if isinstance(layer, RoutedLayer):
                with torch.no_grad():
                    for expert, weight in enumerate(weights.tolist()):
                        delta = layer.rows("up", expert).mT @ layer.directions(expert)
                        merged.get_submodule(name).weight += weight * delta
                        merged.get_submodule(name).bias += weight * layer.expert_bias[expert]
        expected = output(merged, {"pixel_values": inputs["pixel_values"][row : row + 1]})
        torch.testing.assert_close(result[row : row + 1], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "mlp"])
@pytest.mark.parametrize("options", [{}, {"k": -1}, {"storage": "int8"}])
def test_merged_weights_compute_the_same(name: str, options: dict[str, object]) -> None:
    make, make_inputs = ARCHITECTURES[name]
    base, inputs = make().double(), make_inputs()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    options = {"k": 6, "gate_k": 3, "routing_scope": "two_pass", "convolutions": True, **options}
    experts = [expert.double() for expert in experts_of(base, scale=0.3)]
    grouped, merged = (upscale(base, experts, execution=e, **options) for e in ("grouped", "merged"))
    expected = output(grouped, inputs)
    with record_routing(merged) as routing:
        torch.testing.assert_close(output(merged, inputs), expected, atol=1e-9, rtol=1e-9)
    assert all(len(layer.experts) for layer in routing.values())
    assert torch.equal(choice_of(merged, inputs), choice_of(grouped, inputs))
    for expert in ("0", "2"):
        with as_expert(merged, expert), as_expert(grouped, expert):
            torch.testing.assert_close(output(merged, inputs), output(grouped, inputs), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("top_k", [1, 2])
def test_an_expert_may_have_changed_biases_alone(tower: nn.Module, top_k: int) -> None:
    biases, weights = copy.deepcopy(tower), copy.deepcopy(tower)
    with torch.no_grad():
        for layer in (layer for layer in biases.modules() if isinstance(layer, nn.Linear)):
            layer.bias += torch.randn_like(layer.bias)
        for layer in (layer for layer in weights.modules() if isinstance(layer, nn.Linear)):
            layer.weight += 0.05 * torch.randn_like(layer.weight)
    model = upscale(tower, [biases, weights], k=32, gate_k=4, top_k=top_k, routing_scope="two_pass")
    images = torch.randn(6, 3, 28, 28)
    with use_experts(model, torch.eye(2)[[0, 1, 1, 0, 0, 1]]):
        result = output(model, {"pixel_values": images})
    expected = [output(expert, {"pixel_values": images}) for expert in (biases, weights)]
    for row, expert in enumerate([0, 1, 1, 0, 0, 1]):
        torch.testing.assert_close(result[row], expected[expert][row], rtol=1e-4, atol=1e-4)


def test_merged_weights_leave_inputs_without_an_expert_alone(tower: nn.Module) -> None:
    model = upscale(tower, experts_of(tower), k=4, gate_k=2, routing_scope="two_pass", execution="merged")
    layer = next(layer for layer in model.modules() if isinstance(layer, RoutedLayer))
    x = torch.randn(5, 3, layer.weight.shape[1])
    choice = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0]], dtype=torch.float)
    with use_experts(model, choice):
        result, plain = layer(x), nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(result[[0, 2]], plain[[0, 2]])
    assert (result[[1, 3, 4]] - plain[[1, 3, 4]]).abs().amax(dim=(1, 2)).min() > 1e-4
    with use_experts(model, torch.zeros(5, 3)):
        torch.testing.assert_close(layer(x), plain)


def test_two_pass_chooses_by_the_hidden_states_of_the_pretrained_model(tower: nn.Module) -> None:
    """The score of an input is the mean over all layers of their routers' scores of the pretrained model's states."""
    model = upscale(tower, experts_of(tower), k=8, gate_k=4, routing_scope="two_pass")
    inputs = clip_inputs()
    states: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _, args, __, name=name: states.update({name: args[0]}))
        for name, layer in tower.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    output(tower, inputs)
    for hook in hooks:
        hook.remove()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, RoutedLayer)}
    expected = torch.stack([router_scores(layers[name], states[name]).mean(dim=1) for name in layers]).mean(dim=0)
    with record_choices(model) as calls:
        output(model, inputs)
    torch.testing.assert_close(calls[0].scores, expected)
    assert torch.equal(choice_of(model, inputs).argmax(-1), expected.argmax(-1))


def test_global_chooses_by_all_layers_so_far(tower: nn.Module) -> None:
    model = upscale(tower, experts_of(tower), k=8, gate_k=4, routing_scope="global")
    sequence = upscale(tower, experts_of(tower), k=8, gate_k=4, routing_scope="sequence")
    inputs = clip_inputs()
    with record_routing(model) as so_far, record_routing(sequence) as each:
        output(model, inputs)
        output(sequence, inputs)
    first = next(name for name in so_far if name.endswith("q_proj"))  # it is called first
    others = [name for name in so_far if name != first]
    torch.testing.assert_close(so_far[first].scores[0], each[first].scores[0])
    assert all(layer.scores[0].shape == (6, 3) for layer in so_far.values())
    assert any(not torch.allclose(so_far[name].scores[0], each[name].scores[0]) for name in others)


def choices(state: RoutingState, scope: str) -> list[Tensor]:
    """The experts of each layer, or the weights of the choice for all layers."""
    if scope == "two_pass":
        return [state.choice]
    return [weights.argmax(-1) for weights in state.layer_weights.values()]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("beams", [1, 2])
def test_a_decoder_keeps_the_choice_of_its_prompt(scope: str, beams: int) -> None:
    base = tied_llama()
    model: LlamaForCausalLM = upscale(base, experts_of(base, scale=0.3), k=4, gate_k=2, routing_scope=scope)
    prompt = torch.randint(1, 40, (3, 5))
    with torch.no_grad(), record_choices(model) as calls:
        last = next(n for n in inspect.signature(model.forward).parameters if n.endswith("logits_to_keep"))
        model(input_ids=prompt, **{last: 1})  # as generation does; transformers 4.48 has another name
        generated = model.generate(prompt, max_new_tokens=4, do_sample=False, num_beams=beams, pad_token_id=0)
    first = choices(calls[0], scope)
    assert generated.shape[0] == 3
    assert generated.shape[1] > 5
    assert len(calls) > 2
    for state in calls[1:]:
        for before, later in zip(first, choices(state, scope), strict=True):
            assert torch.equal(later, before.repeat_interleave(len(later) // len(before), dim=0))
    one_by_one = [
        model.generate(row[None], max_new_tokens=4, do_sample=False, num_beams=beams, pad_token_id=0) for row in prompt
    ]
    for row, alone in enumerate(one_by_one):
        assert torch.equal(generated[row, : alone.shape[1]], alone[0])


def test_generation_equals_that_of_the_chosen_expert() -> None:
    """With all ranks, two-pass generation is that of the fine-tuned model itself, step by step with its cache."""
    base = tied_llama()
    experts = [perturbed(base, 0.3, seed) for seed in (1, 2)]
    for expert in experts:  # this model has the pretrained norms, and no head beside the embeddings
        expert.model.embed_tokens.weight.data.copy_(base.model.embed_tokens.weight)
        for name, module in expert.named_modules():
            if "norm" in name:
                module.weight.data.copy_(base.get_submodule(name).weight)
    model = upscale(base, experts, k=16, gate_k=2, routing_scope="two_pass", exclude_modules=["lm_head"])
    prompt = torch.randint(1, 40, (4, 5))
    generated = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for row, expert in enumerate(choose_experts(model, input_ids=prompt).argmax(-1).tolist()):
        expected = experts[expert].generate(prompt[row][None], max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert torch.equal(generated[row, : expected.shape[1]], expected[0])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("beams", [1, 3])
def test_an_encoder_chooses_for_its_decoder(scope: str, beams: int) -> None:
    base = t5()
    model: T5ForConditionalGeneration = upscale(base, experts_of(base, scale=0.2), k=8, gate_k=4, routing_scope=scope)
    ids = torch.randint(1, 64, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, num_beams=beams)
    assert len(generated) == 3
    for row in range(3):
        tokens = ids[row][mask[row].bool()]
        alone = model.generate(tokens[None], max_new_tokens=5, do_sample=False, num_beams=beams)
        width = min(alone.shape[1], generated.shape[1])
        assert torch.equal(generated[row, :width], alone[0, :width])


def test_a_part_of_the_model_called_alone_is_refused(tower: nn.Module) -> None:
    model = upscale(tower, experts_of(tower), k=4, gate_k=2, routing_scope="two_pass")
    with pytest.raises(RuntimeError, match="call the model itself"):
        next(layer for layer in model.modules() if isinstance(layer, RoutedLayer))(torch.randn(2, 3, 32))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("options", [{}, {"storage": "int8"}, {"top_k": 2, "routing_score": "weighted"}])
def test_a_checkpoint_routes_as_before(name: str, scope: str, options: dict[str, object], tmp_path) -> None:
    make, make_inputs = ARCHITECTURES[name]
    base, inputs = make(), make_inputs()
    model = upscale(base, experts_of(base), k=6, gate_k=3, routing_scope=scope, **options)
    expected = output(model, inputs)
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model", None if name != "mlp" else base).eval()
    assert torch.equal(output(loaded, inputs), expected)
    assert router_of(loaded).scope == scope
