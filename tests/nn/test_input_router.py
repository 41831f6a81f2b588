"""One choice of experts for a whole input: what it rests on, that inputs are independent, and how long it is kept."""

from __future__ import annotations

import copy
import inspect
import itertools
import math

import pytest
import torch
from conftest import ARCHITECTURES, clip_inputs, clip_tower, experts_of, output, perturbed, t5, tied_llama, to_dtype
from torch import Tensor, nn
from transformers import LlamaForCausalLM, T5ForConditionalGeneration

from fusion_bench_smile import (
    choose_experts,
    load,
    record_choices,
    record_routing,
    save,
    upscale,
    use_experts,
)
from fusion_bench_smile.nn import RIDGE, RoutedLayer, SmileLinear, routed_layers, router_of
from fusion_bench_smile.nn.input_router import SCORED_SHARE
from fusion_bench_smile.nn.routing_policy import LEAST_SPREAD, SHARPNESS

SCOPES = ("token", "input")


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
@pytest.mark.parametrize("top_k", [1, 2])
def test_inputs_of_a_batch_are_routed_independently(tower: nn.Module, scope: str, top_k: int) -> None:
    model = upscale(tower, experts_of(tower), k=8, gate_k=4, top_k=top_k, routing_scope=scope)
    images = torch.cat([scale * torch.randn(4, 3, 28, 28) for scale in (0.1, 1.0, 3.0)])
    together = output(model, {"pixel_values": images})
    order = torch.randperm(len(images))
    torch.testing.assert_close(output(model, {"pixel_values": images[order]}), together[order])
    alone = torch.cat([output(model, {"pixel_values": image[None]}) for image in images])
    torch.testing.assert_close(alone, together)


def expected_choice(base: nn.Module, experts: list[nn.Module], inputs: dict[str, Tensor], top_k: int) -> Tensor:
    """The weights by dense algebra on the inputs of the pretrained model's layers."""
    hooked, states = copy.deepcopy(base), {}
    layers = [name for name, layer in hooked.named_modules() if isinstance(layer, nn.Linear)]
    for name in layers:
        hooked.get_submodule(name).register_forward_hook(lambda _, args, __, name=name: states.update({name: args[0]}))
    output(hooked, inputs)
    logs = []
    for name in layers[: math.ceil(SCORED_SHARE * len(layers))]:
        x = states[name]
        deltas = [expert.get_submodule(name).weight - base.get_submodule(name).weight for expert in experts]
        rows = torch.cat([torch.linalg.svd(delta).Vh[:4] for delta in deltas])
        coefficients = torch.linalg.solve(rows @ rows.mT + RIDGE * torch.eye(len(rows)), rows @ x.mT)
        shares = coefficients.unflatten(1, (len(experts), 4)).square().sum(2) / x.square().sum(-1)[:, None]
        mask = inputs.get("attention_mask", torch.ones(x.shape[:2]))[:, None]
        logs.append(((shares * mask).sum(-1) / mask.sum(-1)).log())  # of shares (B, T, tokens)
    best = torch.stack(logs).mean(dim=0).argmax(-1, keepdim=True)
    behind = torch.stack([log.gather(1, best) - log for log in logs])
    scores = -SHARPNESS * behind.mean(dim=0) / behind.std(dim=0, correction=0).clamp(min=LEAST_SPREAD)
    kept = scores.topk(top_k)
    return torch.zeros_like(scores).scatter(1, kept.indices, kept.values.softmax(-1))


def merged(base: nn.Module, experts: list[nn.Module], weights: Tensor) -> nn.Module:
    """The pretrained model plus the weighted sum of the experts' deltas of rank 8, and of their biases."""
    result = copy.deepcopy(base)
    for name, layer in result.named_modules():
        for weight, expert in zip(weights, experts, strict=True):
            if isinstance(layer, nn.Linear):
                start, end = base.get_submodule(name), expert.get_submodule(name)
                u, s, vh = torch.linalg.svd(end.weight - start.weight, full_matrices=False)
                layer.weight += weight * (u[:, :8] * s[:8]) @ vh[:8]
                if layer.bias is not None:
                    layer.bias += weight * (end.bias - start.bias)
    return result


def padded_text() -> dict[str, Tensor]:
    mask = torch.ones(5, 6)
    mask[1, 4:] = mask[3, 1:] = 0
    return {"input_ids": torch.randint(1, 40, (5, 6)), "attention_mask": mask}


@torch.no_grad()
@pytest.mark.parametrize(("execution", "top_k"), itertools.product(("auto", "grouped", "masked"), (1, 2, 3)))
@pytest.mark.parametrize(
    ("make", "make_inputs"),
    [(clip_tower, clip_inputs), (lambda: tied_llama().model, padded_text)],
    ids=["clip", "llama"],
)
def test_an_input_is_served_by_the_weighted_sum_of_its_experts(make, make_inputs, execution: str, top_k: int) -> None:
    """The experts of the largest energy shares, in dense float64 algebra."""
    base, inputs = make().double(), to_dtype(make_inputs(), torch.float64)
    experts = experts_of(base)
    model = upscale(base, experts, k=8, gate_k=4, top_k=top_k, routing_scope="input", execution=execution)
    expected = expected_choice(base, experts, inputs, top_k)
    torch.testing.assert_close(choice_of(model, inputs).double(), expected, atol=1e-5, rtol=1e-5)
    result = output(model, inputs)
    for row, weights in enumerate(expected):
        single = {name: value[row : row + 1] for name, value in inputs.items()}
        tokens = single.get("attention_mask", torch.ones(1, result.shape[1]))[0].bool()
        reference = output(merged(base, experts, weights), single)[0]
        torch.testing.assert_close(result[row, tokens], reference[tokens], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "mlp"])
@pytest.mark.parametrize(
    "options", [{}, {"k": -1}, {"k": -1, "density": 0.2}, {"storage": "int8"}, {"storage": "int4"}]
)
def test_experts_that_are_given_are_computed_by_merged_weights(name: str, options: dict[str, object]) -> None:
    make, make_inputs = ARCHITECTURES[name]
    base, inputs = make().double(), make_inputs()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    options = {"k": 6, "gate_k": 3, "routing_scope": "input", "convolutions": True, **options}
    experts = [expert.double() for expert in experts_of(base, scale=0.3)]
    grouped, merged = (upscale(base, experts, execution=e, **options) for e in ("grouped", "auto"))
    torch.testing.assert_close(output(merged, inputs), output(grouped, inputs), atol=1e-9, rtol=1e-9)
    for weights in (torch.eye(3)[2], torch.tensor([0.5, 0.0, 0.75]), torch.zeros(3)):
        with use_experts(merged, weights), use_experts(grouped, weights), record_routing(merged) as routing:
            torch.testing.assert_close(output(merged, inputs), output(grouped, inputs), atol=1e-9, rtol=1e-9)
            assert router_of(merged).merged_weights.num_bytes > 0 == router_of(grouped).merged_weights.num_bytes
        assert all(len(layer.experts) for layer in routing.values())


@pytest.mark.parametrize("top_k", [1, 2])
def test_an_expert_may_have_changed_biases_alone(tower: nn.Module, top_k: int) -> None:
    biases, weights = copy.deepcopy(tower), copy.deepcopy(tower)
    with torch.no_grad():
        for layer in (layer for layer in biases.modules() if isinstance(layer, nn.Linear)):
            layer.bias += torch.randn_like(layer.bias)
        for layer in (layer for layer in weights.modules() if isinstance(layer, nn.Linear)):
            layer.weight += 0.05 * torch.randn_like(layer.weight)
    model = upscale(tower, [biases, weights], k=32, gate_k=4, top_k=top_k, routing_scope="input")
    images = torch.randn(6, 3, 28, 28)
    with use_experts(model, torch.eye(2)[[0, 1, 1, 0, 0, 1]]):
        result = output(model, {"pixel_values": images})
    expected = [output(expert, {"pixel_values": images}) for expert in (biases, weights)]
    for row, expert in enumerate([0, 1, 1, 0, 0, 1]):
        torch.testing.assert_close(result[row], expected[expert][row], rtol=1e-4, atol=1e-4)


def test_inputs_without_an_expert_are_the_pretrained_models(tower: nn.Module) -> None:
    model = upscale(tower, experts_of(tower), k=4, gate_k=2, routing_scope="input")
    layer = next(layer for layer in model.modules() if isinstance(layer, RoutedLayer))
    x = torch.randn(5, 3, layer.weight.shape[1])
    choice = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0]], dtype=torch.float)
    with use_experts(model, choice):
        result, plain = layer(x), nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(result[[0, 2]], plain[[0, 2]])
    assert (result[[1, 3, 4]] - plain[[1, 3, 4]]).abs().amax(dim=(1, 2)).min() > 1e-4
    with use_experts(model, torch.zeros(5, 3)):
        torch.testing.assert_close(layer(x), plain)


def test_the_first_pass_ends_with_the_last_layer_that_scores_inputs(tower: nn.Module, monkeypatch) -> None:
    """Unless a hook waits for the end of a part of the model."""
    model, inputs, calls = upscale(tower, experts_of(tower), k=8, gate_k=4, routing_scope="input"), clip_inputs(), []
    expected = output(model, inputs)  # the first call examines the layers
    plain = SmileLinear.plain_output
    monkeypatch.setattr(SmileLinear, "plain_output", lambda layer, *args: calls.append(layer) or plain(layer, *args))
    first, *_, last = routed_layers(model).values()
    assert torch.equal(output(model, inputs), expected)
    assert (calls.count(first), calls.count(last)) == (2, 1)
    last.register_forward_hook(lambda *_: None)
    assert torch.equal(output(model, inputs), expected)
    assert (calls.count(first), calls.count(last)) == (4, 3)


@pytest.mark.parametrize("beams", [1, 2])
def test_a_decoder_keeps_the_choice_of_its_prompt(beams: int) -> None:
    base = tied_llama()
    model: LlamaForCausalLM = upscale(base, experts_of(base, scale=0.3), k=4, gate_k=2, routing_scope="input")
    prompt = torch.randint(1, 40, (3, 5))
    with torch.no_grad(), record_choices(model) as calls:
        last = next(n for n in inspect.signature(model.forward).parameters if n.endswith("logits_to_keep"))
        model(input_ids=prompt, **{last: 1})  # as generation does; transformers 4.48 has another name
        generated = model.generate(prompt, max_new_tokens=4, do_sample=False, num_beams=beams, pad_token_id=0)
    assert generated.shape[0] == 3
    assert generated.shape[1] > 5
    assert len(calls) > 2
    for choice in (state.choice for state in calls[1:]):
        assert torch.equal(choice, calls[0].choice.repeat_interleave(len(choice) // 3, dim=0))
    one_by_one = [
        model.generate(row[None], max_new_tokens=4, do_sample=False, num_beams=beams, pad_token_id=0) for row in prompt
    ]
    for row, alone in enumerate(one_by_one):
        assert torch.equal(generated[row, : alone.shape[1]], alone[0])


def test_generation_equals_that_of_the_chosen_expert() -> None:
    """With all ranks, generation is that of the fine-tuned model itself, step by step with its cache."""
    base = tied_llama()
    experts = [perturbed(base, 0.3, seed) for seed in (1, 2)]
    for expert in experts:  # this model has the pretrained norms, and no head beside the embeddings
        expert.model.embed_tokens.weight.data.copy_(base.model.embed_tokens.weight)
        for name, module in expert.named_modules():
            if "norm" in name:
                module.weight.data.copy_(base.get_submodule(name).weight)
    model = upscale(base, experts, k=16, gate_k=2, routing_scope="input", exclude_modules=["lm_head"])
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
    model = upscale(tower, experts_of(tower), k=4, gate_k=2, routing_scope="input")
    with pytest.raises(RuntimeError, match="call the model itself"):
        next(layer for layer in model.modules() if isinstance(layer, RoutedLayer))(torch.randn(2, 3, 32))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("options", [{}, {"storage": "int8"}, {"storage": "int4", "top_k": 2}])
def test_a_checkpoint_routes_as_before(name: str, scope: str, options: dict[str, object], tmp_path) -> None:
    make, make_inputs = ARCHITECTURES[name]
    base, inputs = make(), make_inputs()
    model = upscale(base, experts_of(base), k=6, gate_k=3, routing_scope=scope, **options)
    expected = output(model, inputs)
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model", None if name != "mlp" else base).eval()
    assert torch.equal(output(loaded, inputs), expected)
    assert (router_of(loaded) is None) == (scope == "token")


def test_the_first_pass_ends_after_the_layers_that_are_scored(tower: nn.Module) -> None:
    model, inputs = upscale(tower, experts_of(tower), k=8, gate_k=4, routing_scope="input"), clip_inputs()
    expected, last, calls = output(model, inputs), list(routed_layers(model).values())[-1], []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(module is last))
    try:
        assert torch.equal(output(model, inputs), expected)
        assert sum(calls) == 1  # in the second pass
        calls.clear()
        last.register_forward_hook(lambda *_: None)  # a hook would miss the end
        assert torch.equal(output(model, inputs), expected)
        assert sum(calls) == 2
    finally:
        handle.remove()
