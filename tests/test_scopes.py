"""One choice of experts for a whole input: what decides, that inputs don't disturb each other, and what is kept."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from conftest import ARCHITECTURES, clip_inputs, clip_tower, experts_of, output, perturbed, t5, tied_llama
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlamaForCausalLM, T5ForConditionalGeneration

from fusion_bench_smile import ConfigError, PlanError, as_expert, load, record_routing, save, upscale
from fusion_bench_smile.layers import RIDGE, Routed
from fusion_bench_smile.scopes import ROUTER, InputRouter

SCOPES = ("sequence", "global", "two_pass")
SCORES = ("norm", "weighted", "relative", "dual", "output")


def router_of(model: nn.Module) -> InputRouter:
    router = getattr(model, ROUTER)
    assert isinstance(router, InputRouter)
    return router


def choice_of(model: nn.Module) -> Tensor:
    choice = router_of(model).choice
    assert choice is not None
    return choice


@pytest.fixture(scope="module")
def tower() -> nn.Module:
    torch.manual_seed(0)
    return clip_tower()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_inputs_of_a_batch_are_routed_each_on_its_own(tower: nn.Module, scope: str, score: str, top_k: int) -> None:
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
def test_two_pass_computes_the_chosen_experts_delta(tower: nn.Module, execution: str, top_k: int) -> None:
    experts = experts_of(tower)
    model = upscale(
        tower, experts, k=8, gate_k=4, top_k=top_k, routing_scope="two_pass", execution=execution, routing_score="norm"
    ).double()
    inputs = {"pixel_values": torch.randn(5, 3, 28, 28, dtype=torch.float64)}
    found = output(model, inputs)
    for row, weights in enumerate(choice_of(model)):
        assert int((weights > 0).sum()) == top_k
        assert weights.sum() == pytest.approx(1)
        merged = copy.deepcopy(tower).double()
        for name, layer in model.named_modules():
            if isinstance(layer, Routed):
                with torch.no_grad():
                    for expert, share in enumerate(weights.tolist()):
                        up = layer.rows("up", layer.layout.low_ranks, expert)
                        delta = up.mT @ layer._directions(expert)
                        merged.get_submodule(name).weight += share * delta
                        merged.get_submodule(name).bias += share * layer.expert_bias[expert]
        expected = output(merged, {"pixel_values": inputs["pixel_values"][row : row + 1]})
        torch.testing.assert_close(found[row : row + 1], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "mlp"])
@pytest.mark.parametrize("options", [{}, {"k": -1}, {"storage": "int8"}])
def test_merged_weights_compute_the_same(name: str, options: dict[str, object]) -> None:
    make, make_inputs = ARCHITECTURES[name]
    base, inputs = make().double(), make_inputs()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    options = {"k": 6, "gate_k": 3, "routing_scope": "two_pass", "convolutions": True, **options}
    experts = [expert.double() for expert in experts_of(base, scale=0.3)]
    apart, merged = (upscale(base, experts, execution=e, **options) for e in ("grouped", "merged"))
    expected = output(apart, inputs)
    with record_routing(merged) as routing:
        torch.testing.assert_close(output(merged, inputs), expected, atol=1e-9, rtol=1e-9)
    assert all(len(layer.choices) for layer in routing.values())
    assert torch.equal(choice_of(merged), choice_of(apart))
    for expert in ("0", "2"):
        with as_expert(merged, expert), as_expert(apart, expert):
            torch.testing.assert_close(output(merged, inputs), output(apart, inputs), atol=1e-9, rtol=1e-9)


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
    router_of(model).forced = torch.eye(2)[[0, 1, 1, 0, 0, 1]]
    found = output(model, {"pixel_values": images})
    expected = [output(expert, {"pixel_values": images}) for expert in (biases, weights)]
    for row, expert in enumerate([0, 1, 1, 0, 0, 1]):
        torch.testing.assert_close(found[row], expected[expert][row], rtol=1e-4, atol=1e-4)


def test_merged_weights_leave_inputs_without_an_expert_alone(tower: nn.Module) -> None:
    model = upscale(tower, experts_of(tower), k=4, gate_k=2, routing_scope="two_pass", execution="merged")
    layer = next(layer for layer in model.modules() if isinstance(layer, Routed))
    x, router = torch.randn(5, 3, layer.weight.shape[1]), router_of(model)
    router._inputs, router.scores = 5, torch.zeros(5, 3)
    router.choice = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0]], dtype=torch.float)
    found, plain = layer(x), nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(found[[0, 2]], plain[[0, 2]])
    assert (found[[1, 3, 4]] - plain[[1, 3, 4]]).abs().amax(dim=(1, 2)).min() > 1e-4
    router._groups, router.choice = None, torch.zeros(5, 3)
    torch.testing.assert_close(layer(x), plain)


def test_two_pass_is_decided_by_the_pretrained_model_alone(tower: nn.Module) -> None:
    """The scores are the mean over all layers of what their routers score of the pretrained model's own states."""
    model = upscale(tower, experts_of(tower), k=8, gate_k=4, routing_scope="two_pass")
    inputs = clip_inputs()
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _, args, __, name=name: seen.update({name: args[0]}))
        for name, layer in tower.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    output(tower, inputs)
    for hook in hooks:
        hook.remove()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Routed)}
    expected = torch.stack([layers[name].scores(seen[name]).mean(dim=1) for name in layers]).mean(dim=0)
    output(model, inputs)
    torch.testing.assert_close(router_of(model).scores, expected)
    assert torch.equal(choice_of(model).argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("storage", ["same", "int8"])
def test_scores_are_what_they_say(tower: nn.Module, score: str, storage: str) -> None:
    """Against float64 algebra, of rows that overlap."""
    model = upscale(tower, experts_of(tower), k=8, gate_k=4, routing_score=score, storage=storage)
    layer = next(layer for layer in model.modules() if isinstance(layer, Routed))
    x = torch.randn(2, 5, layer.weight.shape[1])
    out = nn.functional.linear(x, layer.weight, layer.bias).double()
    rows = [layer.rows("gate", layer.layout.gate_ranks, expert).double() for expert in range(3)]
    values = [layer.rows("up", layer.layout.low_ranks, e)[: len(rows[e])].double().norm(dim=1) for e in range(3)]
    y, everything = x.double(), torch.cat(rows)
    gram = everything @ everything.mT + RIDGE * torch.eye(len(everything), dtype=torch.double)
    coefficients = torch.linalg.solve(gram, (y @ everything.mT).flatten(0, 1).mT).mT.view(2, 5, -1).split([4] * 3, -1)
    size = y.square().sum(-1)
    each = {
        "norm": [(y @ r.mT).norm(dim=-1) for r in rows],
        "weighted": [((y @ r.mT) * s / s[0]).norm(dim=-1) for r, s in zip(rows, values, strict=True)],
        "relative": [(y @ r.mT).square().sum(-1) / size for r in rows],
        "dual": [c.square().sum(-1) / size for c in coefficients],
        "output": [((y @ r.mT) * s).norm(dim=-1) / out.norm(dim=-1) for r, s in zip(rows, values, strict=True)],
    }
    expected = torch.stack(each[score], dim=-1).float()
    torch.testing.assert_close(layer.scores(x, out.float()), expected, atol=1e-4, rtol=1e-3)
    energies = layer.energies(x)
    weighted = [((y @ r.mT) * s).square().sum(-1) / size for r, s in zip(rows, values, strict=True)]
    both = torch.stack([*each["dual"], *weighted], dim=-1).float()
    torch.testing.assert_close(energies, both, atol=1e-4, rtol=1e-3)


def test_global_goes_by_all_layers_so_far(tower: nn.Module) -> None:
    model = upscale(tower, experts_of(tower), k=8, gate_k=4, routing_scope="global")
    sequence = upscale(tower, experts_of(tower), k=8, gate_k=4, routing_scope="sequence")
    inputs = clip_inputs()
    with record_routing(model) as so_far, record_routing(sequence) as apart:
        output(model, inputs)
        output(sequence, inputs)
    first = next(name for name in so_far if name.endswith("q_proj"))  # which is called first
    others = [name for name in so_far if name != first]
    torch.testing.assert_close(so_far[first].scores[0], apart[first].scores[0])
    assert all(of_layer.scores[0].shape == (6, 3) for of_layer in so_far.values())
    assert any(not torch.allclose(so_far[name].scores[0], apart[name].scores[0]) for name in others)


@pytest.mark.parametrize("scope", SCOPES)
def test_padding_does_not_count(scope: str) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )  # fmt: skip
    base = BertModel(config, add_pooling_layer=False).eval()
    model = upscale(base, experts_of(base), k=8, gate_k=4, routing_scope=scope, routing_score="relative")
    ids = torch.randint(1, 50, (3, 7))
    plain = output(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    choices = choice_of(model) if scope == "two_pass" else None
    padded = torch.cat([ids, torch.randint(1, 50, (3, 5))], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(3, 5, dtype=torch.long)], dim=1)
    longer = output(model, {"input_ids": padded, "attention_mask": mask})[:, :7]
    torch.testing.assert_close(longer, plain, atol=1e-5, rtol=1e-5)
    if choices is not None:
        assert torch.equal(choice_of(model), choices)


def test_padding_does_count_without_a_mask() -> None:
    """The counterpart: were the mask not honoured above, other tokens would change the scores."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )  # fmt: skip
    base = BertModel(config, add_pooling_layer=False).eval()
    model = upscale(base, experts_of(base), k=8, gate_k=4, routing_scope="two_pass")
    ids = torch.randint(1, 50, (3, 7))
    output(model, {"input_ids": ids})
    before = router_of(model).scores.clone()
    output(model, {"input_ids": torch.cat([ids, torch.randint(1, 50, (3, 5))], dim=1)})
    assert not torch.allclose(router_of(model).scores, before, atol=1e-6)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("beams", [1, 2])
def test_a_decoder_keeps_the_choice_of_its_prompt(scope: str, beams: int) -> None:
    base = tied_llama()
    model: LlamaForCausalLM = upscale(base, experts_of(base, scale=0.3), k=4, gate_k=2, routing_scope=scope)
    prompt = torch.randint(1, 40, (3, 5))
    with torch.no_grad():
        last = next(n for n in inspect.signature(model.forward).parameters if n.endswith("logits_to_keep"))
        model(input_ids=prompt, **{last: 1})  # as generation does; transformers 4.48 has another name
    router = router_of(model)
    kept = [choice.argmax(-1) for choice in router._kept.values()] if scope != "two_pass" else [choice_of(model)]
    told = model.generate(prompt, max_new_tokens=4, do_sample=False, num_beams=beams, pad_token_id=0)
    assert told.shape[0] == 3
    assert told.shape[1] > 5
    after = [choice.argmax(-1) for choice in router._kept.values()] if scope != "two_pass" else [choice_of(model)]
    for before, later in zip(kept, after, strict=True):
        assert torch.equal(later, before.repeat_interleave(len(later) // len(before), dim=0))
    one_by_one = [
        model.generate(row[None], max_new_tokens=4, do_sample=False, num_beams=beams, pad_token_id=0) for row in prompt
    ]
    for row, alone in enumerate(one_by_one):
        assert torch.equal(told[row, : alone.shape[1]], alone[0])


def test_generation_equals_that_of_the_chosen_expert() -> None:
    """With all ranks, two-pass generation is that of the fine-tuned model itself, step by step with its cache."""
    base = tied_llama()
    experts = [perturbed(base, 0.3, seed) for seed in (1, 2)]
    for expert in experts:  # what is tied to the embeddings, and the norms, aren't part of this model
        expert.model.embed_tokens.weight.data.copy_(base.model.embed_tokens.weight)
        for name, module in expert.named_modules():
            if "norm" in name:
                module.weight.data.copy_(base.get_submodule(name).weight)
    model = upscale(base, experts, k=16, gate_k=2, routing_scope="two_pass", exclude_modules=["lm_head"])
    prompt = torch.randint(1, 40, (4, 5))
    told = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    chosen = choice_of(model).argmax(-1).tolist()
    for row, expert in enumerate(chosen):
        own = experts[expert].generate(prompt[row][None], max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert torch.equal(told[row, : own.shape[1]], own[0])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("beams", [1, 3])
def test_an_encoder_decides_for_its_decoder(scope: str, beams: int) -> None:
    base = t5()
    model: T5ForConditionalGeneration = upscale(base, experts_of(base, scale=0.2), k=8, gate_k=4, routing_scope=scope)
    ids = torch.randint(1, 64, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    told = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, num_beams=beams)
    assert len(told) == 3
    for row in range(3):
        real = mask[row].bool()
        alone = model.generate(ids[row][real][None], max_new_tokens=5, do_sample=False, num_beams=beams)
        width = min(alone.shape[1], told.shape[1])
        assert torch.equal(told[row, :width], alone[0, :width])


def test_a_part_of_the_model_says_that_it_does_not_see_inputs(tower: nn.Module) -> None:
    model = upscale(tower, experts_of(tower), k=4, gate_k=2, routing_scope="two_pass")
    with pytest.raises(RuntimeError, match="call the model itself"):
        next(layer for layer in model.modules() if isinstance(layer, Routed))(torch.randn(2, 3, 32))


def test_the_wrapped_vision_model_is_an_entrance_too(tower: nn.Module) -> None:
    model: CLIPVisionModel = upscale(tower, experts_of(tower), k=4, gate_k=2, routing_scope="two_pass")
    inputs = clip_inputs()
    inner = getattr(model, "vision_model", model)
    with torch.no_grad():
        torch.testing.assert_close(inner(**inputs).pooler_output, model(**inputs).pooler_output)


def test_after_an_error_the_next_call_works(tower: nn.Module) -> None:
    model = upscale(tower, experts_of(tower), k=4, gate_k=2, routing_scope="two_pass")
    inputs = clip_inputs()
    before = output(model, inputs)
    with pytest.raises((RuntimeError, ValueError)):  # whatever the model raises for images of another size
        output(model, {"pixel_values": torch.randn(2, 3, 5, 5)})
    assert torch.equal(output(model, inputs), before)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_copy_routes_for_itself(tower: nn.Module, scope: str) -> None:
    model = upscale(tower, experts_of(tower), k=4, gate_k=2, routing_scope=scope)
    other = copy.deepcopy(model)
    inputs, others = clip_inputs(), clip_inputs()
    expected = output(model, inputs)
    output(other, others)
    torch.testing.assert_close(output(other, inputs), expected)
    assert router_of(other) is not router_of(model)
    assert all(layer.input_choice is router_of(other) for layer in other.modules() if isinstance(layer, Routed))


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


def test_the_default_has_no_router(tower: nn.Module) -> None:
    model = upscale(tower, experts_of(tower), k=4, gate_k=2)
    assert not hasattr(model, ROUTER)
    assert all(layer.input_choice is None for layer in model.modules() if isinstance(layer, Routed))
    with pytest.raises(ConfigError, match="routing_scope"), as_expert(model, "0"):
        pass


def test_one_expert_by_name_is_that_expert(tower: nn.Module) -> None:
    experts = dict(zip("abc", experts_of(tower), strict=True))
    model = upscale(tower, experts, k=32, gate_k=2, routing_scope="two_pass", expert_parameters="norms")
    inputs = clip_inputs()
    free = output(model, inputs)
    alone = upscale(tower, {"b": experts["b"]}, k=32)
    with as_expert(model, "b"):
        forced = output(model, inputs)
        assert choice_of(model)[:, 1].eq(1).all()
    for name, module in experts["b"].named_modules():  # the single expert's own norms
        if isinstance(module, nn.LayerNorm):
            alone.get_submodule(name).load_state_dict(module.state_dict())
    torch.testing.assert_close(forced, output(alone, inputs), atol=1e-4, rtol=1e-4)
    assert torch.equal(output(model, inputs), free)
    with pytest.raises(PlanError, match="the experts are: a, b, c"), as_expert(model, "d"):
        pass


def test_watching_tells_the_decision(tower: nn.Module) -> None:
    model = upscale(tower, experts_of(tower), k=4, gate_k=2, routing_scope="two_pass")
    with record_routing(model) as routing:
        output(model, clip_inputs())
    expected = choice_of(model).argmax(-1)
    assert routing
    assert all(torch.equal(layer.choices[0][:, 0], expected) for layer in routing.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routing_scope": "tokens"}, "routing_scope='tokens'"),
        ({"routing_score": "best"}, "routing_score='best'"),
        ({"expert_parameters": "norms"}, "needs routing_scope=two_pass"),
        ({"noise_baseline": True, "routing_scope": "global"}, "needs routing_scope=two_pass"),
        ({"refuse_unknown": True}, "needs routing_scope=two_pass"),
        ({"execution": "merged"}, "needs routing_scope=two_pass and top_k=1"),
        ({"execution": "merged", "routing_scope": "two_pass", "top_k": 2}, "top_k=1"),
        ({"noise_baseline": "yes"}, "not true or false"),
        ({"expert_parameters": "norms", "average_experts": True, "routing_scope": "two_pass"}, "exclude each other"),
    ],
)
def test_what_can_not_be_is_refused(tower: nn.Module, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        upscale(tower, experts_of(tower), k=4, gate_k=2, **options)
