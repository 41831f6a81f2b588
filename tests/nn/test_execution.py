"""The executions of a routed layer: they agree, compile, export, generate and train."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import ARCHITECTURES, clip_tower, experts_of, gpt2, output, t5, tied_llama
from layers import UNIFORM, UNIFORM_AND_RAGGED, random_layer, reference
from torch import nn

from fusion_bench_smile import ConfigError, upscale
from fusion_bench_smile.nn import DENSE, ExpertLayout, RoutedLayer
from fusion_bench_smile.nn.token_execution import MIN_TOKENS, grouping_pays

SYNCHRONISING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "index.Tensor", "where.default", "tolist")


@pytest.mark.parametrize(
    ("layout", "top_k"), [*UNIFORM_AND_RAGGED, (ExpertLayout(ranks=(DENSE, DENSE), gate_ranks=(2, 2)), 1)]
)
def test_the_exported_graph_does_not_synchronise_with_the_host(layout, top_k):
    layer = random_layer(layout, 6, 5, top_k=top_k)
    sizes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},)
    exported = torch.export.export(layer, (torch.randn(4, 3, 6, dtype=torch.float64),), dynamic_shapes=sizes)
    operations = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert any("topk" in operation for operation in operations)
    assert not [o for o in operations if any(o.removeprefix("aten.").startswith(s) for s in SYNCHRONISING)]
    x = torch.randn(7, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(exported.module()(x), layer(x))


@pytest.mark.parametrize(("layout", "top_k"), UNIFORM_AND_RAGGED)
def test_compiles_as_one_graph(layout, top_k):
    layer = random_layer(layout, 6, 5, top_k=top_k)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((4, 6), (9, 6), (2, 3, 6)):
        x = torch.randn(*shape, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("make", [t5, tied_llama, gpt2])
def test_generation_with_a_cache_equals_generation_without(make):
    base = make()
    model = upscale(base, experts_of(base, scale=0.2), k=4, gate_k=2)
    prompt = torch.randint(1, 40, (3, 5))
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached, plain = (model.generate(prompt, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, plain)
    assert not torch.equal(cached, base.generate(prompt, **settings))


@pytest.mark.parametrize("execution", ["grouped", "masked"])
@pytest.mark.parametrize(("layout", "top_k"), UNIFORM_AND_RAGGED)
def test_gradcheck(layout, top_k, execution):
    layer = random_layer(layout, 6, 5, top_k=top_k, execution=execution)
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def function(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *layer.parameters()), eps=1e-7, atol=1e-5)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    inputs = torch.arange(1, 13).view(2, 6)
    model.train()
    model(input_ids=inputs, labels=inputs).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("execution", ["grouped", "masked"])
def test_gradient_checkpointing_changes_no_gradient(execution):
    base = tied_llama()
    model = upscale(base, experts_of(base), k=4, gate_k=2, top_k=2, execution=execution)
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    plain, checkpointed = gradients(model), gradients(again)
    assert plain.keys() == checkpointed.keys()
    assert any(name.endswith(".gate") for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


@pytest.mark.parametrize("frozen", ["gate", "weight"])
def test_parameters_can_be_frozen(frozen):
    base = tied_llama()
    model = upscale(base, experts_of(base), k=4, gate_k=2, top_k=2)
    for module in model.modules():
        if isinstance(module, RoutedLayer):
            getattr(module, frozen).requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    computed = gradients(model)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, gradient in computed.items() if gradient.any()}
    routed = [name for name, m in model.named_modules() if isinstance(m, RoutedLayer)]
    assert not any(f"{name}.{frozen}" in changed for name in routed)
    assert any(f"{name}.up" in changed for name in routed)


@pytest.mark.parametrize("execution", ["grouped", "masked"])
def test_deterministic_mode(execution):
    layer = random_layer(UNIFORM, 6, 5, top_k=2, execution=execution)
    x = torch.randn(50, 6, dtype=torch.float64, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = layer(x), layer(x)
        first.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_both_executions_give_the_same_model(name):
    make, inputs = ARCHITECTURES[name]
    base, x = make(), inputs()
    outputs = [
        output(upscale(base, experts_of(base), k=4, gate_k=2, top_k=top_k, execution=execution), x)
        for top_k in (1, 2)
        for execution in ("grouped", "masked")
    ]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[2], outputs[3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("execution", ["grouped", "masked"])
def test_half_precision_models_and_autocast(dtype, execution):
    base = tied_llama()
    model = upscale(base, experts_of(base), k=4, gate_k=2, execution=execution)
    x = torch.randint(1, 40, (4, 7))
    exact = model(x).logits
    rounded = copy.deepcopy(model).to(dtype)(x).logits
    assert rounded.dtype == dtype
    with torch.autocast("cpu", dtype):
        mixed = model(x).logits
    for logits in (rounded, mixed):  # routing is by rounded inputs: a few tokens may go elsewhere
        near = (logits.float() - exact).abs().amax(-1) < 0.05 * exact.abs().max()
        assert near.double().mean() > 0.8


def test_an_unknown_execution_is_refused():
    base = tied_llama()
    with pytest.raises(ConfigError, match="execution='fast' is not one of auto, grouped, masked"):
        upscale(base, experts_of(base), execution="fast")


def large_layer(**options) -> RoutedLayer:
    return random_layer(ExpertLayout(ranks=(32,) * 4, gate_ranks=(8,) * 4), 512, 512, dtype=torch.float32, **options)


def test_auto_groups_many_tokens_on_the_cpu():
    tokens = torch.randn(4096, 512)
    assert grouping_pays(large_layer(), tokens)
    assert not grouping_pays(large_layer(), tokens[:MIN_TOKENS])
    assert not grouping_pays(large_layer(top_k=4), tokens)  # all experts serve every token
    assert not grouping_pays(large_layer(), tokens.to("meta"))
    assert not grouping_pays(large_layer(execution="masked"), tokens)
    assert grouping_pays(large_layer(execution="grouped"), tokens[:1])
    assert not grouping_pays(large_layer(execution="grouped", top_k=4), tokens)


def test_a_layer_without_a_router_weights_its_experts_equally():
    layout = ExpertLayout(ranks=(0, 0), gate_ranks=(0, 0), expert_bias=True)
    layer = random_layer(layout, 6, 5)
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = nn.functional.linear(x, layer.weight, layer.bias) + layer.expert_bias.mean(0)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x), reference(layer, x), rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {}, {"top_k": 2}, {"k": -1}, {"k": -1, "density": 0.1}, {"storage": "int4"},
        {"routing_scope": "input", "top_k": 2, "execution": "masked"},
    ],
    ids=str,
)  # fmt: skip
def test_no_operation_waits_for_the_values_of_a_device(options):
    """Operations that do have no result on the meta device, which stands for an accelerator."""
    base = clip_tower()
    model = upscale(base, experts_of(base), **{"k": 4, "gate_k": 2, **options})
    pixels = torch.randn(2, 3, 28, 28)
    shape = model(pixel_values=pixels).last_hidden_state.shape
    assert model.to("meta")(pixel_values=pixels.to("meta")).last_hidden_state.shape == shape
    grouped = upscale(base, experts_of(base), k=4, gate_k=2, execution="grouped").to("meta")
    with pytest.raises(NotImplementedError):
        grouped(pixel_values=pixels.to("meta"))


@pytest.mark.parametrize("top_k", [1, 2])
def test_one_token_alone_is_computed_as_in_a_batch(top_k):
    base = nn.Sequential(nn.Linear(20, 32), nn.GELU(), nn.Linear(32, 12))
    model = upscale(base, experts_of(base, 3, 0.3), k=4, gate_k=2, top_k=top_k)
    x = torch.randn(2, 20)
    results = []
    for rows in (x[:1], x):
        model.zero_grad()
        y = model(rows)[:1]
        y.square().sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(model(rows)[:1], y)
        results.append([y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
