"""What holds for every architecture: one table of models, one body of invariants."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, Architecture, experts_of, first_output
from command_line import start_code
from packaging.version import Version
from torch import Tensor, nn

from fusion_bench_smile import as_expert, upscale
from fusion_bench_smile.io import save
from fusion_bench_smile.nn import routed_layers, router_of

SCOPES = ("token", "input")
RECENT = Version(transformers.__version__) >= Version("4.50")
GENERATING = [architecture for architecture in ARCHITECTURES if architecture.generates]
RELOAD = """
import sys, torch, transformers
import fusion_bench_smile
folder = sys.argv[1]
for name, inputs in torch.load(f"{folder}/inputs.pt").items():
    model = getattr(transformers, name).from_pretrained(f"{folder}/{name}", torch_dtype="auto").eval()
    with torch.no_grad():
        torch.save((model.state_dict(), model(**inputs).to_tuple()[0]), f"{folder}/{name}.pt")
"""

each = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)


@cache
def pretrained(architecture: Architecture) -> nn.Module:
    return architecture.make()


@cache
def experts(architecture: Architecture) -> list[nn.Module]:
    return experts_of(pretrained(architecture), architecture.exclude)


@cache
def routed(architecture: Architecture, scope: str) -> nn.Module:
    """A model with full ranks, so that an expert can equal the fine-tuned model."""
    return upscale(
        pretrained(architecture), experts(architecture), k=architecture.largest_rank, gate_k=4, routing_scope=scope,
        exclude_modules=list(architecture.exclude),
    ).eval()  # fmt: skip


@torch.no_grad()
def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return first_output(model(**inputs))


def row(inputs: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    return {name: value[number : number + 1] for name, value in inputs.items()}


@each
def test_an_expert_alone_or_repeated_is_that_expert(architecture: Architecture) -> None:
    base, expert, inputs = pretrained(architecture), experts(architecture)[0], architecture.inputs(3)
    options = {"k": architecture.largest_rank, "exclude_modules": list(architecture.exclude)}
    expected = output(expert, inputs)
    assert (output(base, inputs) - expected).abs().max() > 1e-3  # the experts matter
    for same in ([expert], [expert, expert]):
        result = output(upscale(base, same, **options).eval(), inputs)
        torch.testing.assert_close(result, expected, atol=2e-4, rtol=2e-4)


@each
@pytest.mark.parametrize("scope", SCOPES)
def test_a_batch_is_routed_as_its_inputs_are_one_at_a_time(architecture: Architecture, scope: str) -> None:
    model, inputs = routed(architecture, scope), architecture.inputs(4)
    alone = torch.cat([output(model, row(inputs, number)) for number in range(4)])
    torch.testing.assert_close(output(model, inputs), alone, atol=2e-4, rtol=2e-4)


@each
def test_given_experts_serve_all_layers(architecture: Architecture) -> None:
    model, inputs = routed(architecture, "input"), architecture.inputs(3)
    for name, expert in enumerate(experts(architecture)):
        with as_expert(model, str(name)):
            torch.testing.assert_close(output(model, inputs), output(expert, inputs), atol=1e-3, rtol=1e-3)


@each
def test_layers_that_mix_inputs_route_each_token(architecture: Architecture) -> None:
    model = routed(architecture, "input")
    output(model, architecture.inputs(2))
    layers = routed_layers(model)
    expected = {name for name in layers if any(part in name for part in architecture.token_layers)}
    assert {name for name, layer in layers.items() if layer in router_of(model).token_layers} == expected
    assert bool(expected) == bool(architecture.token_layers)


@each
def test_threads_do_not_share_a_choice(architecture: Architecture) -> None:
    model = routed(architecture, "input")
    calls = [architecture.inputs(count, seed) for seed, count in enumerate((1, 3, 2, 4, 1, 2))]
    expected = [output(model, inputs) for inputs in calls]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda inputs: output(model, inputs), 2 * calls))
    for result, single in zip(results, 2 * expected, strict=True):
        torch.testing.assert_close(result, single, atol=1e-5, rtol=1e-5)


def single_precision(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}


@cache
def saved_model(architecture: Architecture) -> nn.Module:
    """The model that routes inputs in float32: transformers keeps some buffers in it, whatever the model's dtype."""
    return copy.deepcopy(routed(architecture, "input")).float()


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tensors and outputs of all these models, saved here and loaded in another process."""
    folder = tmp_path_factory.mktemp("models")
    for architecture in ARCHITECTURES:
        save(saved_model(architecture), folder / architecture.name)
    inputs = {architecture.name: single_precision(architecture.inputs(3)) for architecture in ARCHITECTURES}
    torch.save(inputs, folder / "inputs.pt")
    process = start_code(RELOAD, str(folder))
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    return folder


@each
def test_a_model_that_another_process_loads_is_the_same(architecture: Architecture, reloaded: Path) -> None:
    model = saved_model(architecture)
    with torch.no_grad():
        expected = model(**single_precision(architecture.inputs(3))).to_tuple()[0]
    tensors, result = torch.load(reloaded / f"{architecture.name}.pt")
    assert tensors.keys() == model.state_dict().keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)  # alignment in memory changes the last bits


@pytest.mark.skipif(not RECENT, reason="transformers 4.48 cannot generate in float64 (GPT-2, OPT, BART, Gemma 2)")
@pytest.mark.parametrize("architecture", GENERATING, ids=str)
@pytest.mark.parametrize("scope", SCOPES)
def test_generation_keeps_the_choice_of_the_prompt(architecture: Architecture, scope: str) -> None:
    model, prompts = routed(architecture, scope), architecture.inputs(3)["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1}

    def one_by_one(**more: object) -> Tensor:
        return torch.cat([model.generate(prompt[None], **options, **more) for prompt in prompts])

    expected = one_by_one()
    assert torch.equal(model.generate(prompts, **options), expected)
    assert torch.equal(model.generate(prompts, **options, use_cache=False), expected)
    assert torch.equal(model.generate(prompts, **options, num_beams=2), one_by_one(num_beams=2))
    if architecture.kind != "tokens":  # state space models can not be
        assert torch.equal(one_by_one(assistant_model=architecture.make(seed=5)), expected)
