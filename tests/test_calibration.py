"""Calibrated routing, random inputs as a baseline, and what experts own beside their layers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import clip_inputs, clip_tower, experts_of, mlp, output, perturbed, t5, tied_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from fusion_bench_smile import ConfigError, PlanError, add_expert, as_expert, calibrate, load, save, upscale
from fusion_bench_smile.checkpoint import section_of
from fusion_bench_smile.noise import random_inputs
from fusion_bench_smile.own import is_norm, owned
from fusion_bench_smile.prototypes import DIRECTIONS, FOLDS, SHRINKAGE, Prototypes
from fusion_bench_smile.scopes import ROUTER

NAMES = ("a", "b", "c")


def images(kind: int, count: int) -> Tensor:
    """Three kinds of images that differ in brightness and grain."""
    noise = torch.randn(count, 3, 28, 28)
    grain = [noise, noise.cumsum(-1) / 5, noise.cumsum(-2) / 5][kind]
    return grain + kind


def calibrated(count: int = 12, **options: object) -> nn.Module:
    torch.manual_seed(0)
    base = clip_tower()
    experts = dict(zip(NAMES, experts_of(base), strict=True))
    model = upscale(base, experts, **{"k": 8, "gate_k": 4, "routing_scope": "two_pass", **options})
    calibrate(model, {name: [{"pixel_values": images(i, count)}] for i, name in enumerate(NAMES)})
    return model


def chosen(model: nn.Module, inputs: Tensor) -> Tensor:
    output(model, {"pixel_values": inputs})
    return model.get_submodule(ROUTER).choice


@given(tasks=st.integers(1, 4), layers=st.integers(1, 3), count=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_distances_are_those_of_the_covariance(tasks: int, layers: int, count: int, seed: int) -> None:
    """Against dense float64 algebra: the shrunk covariance, inverted as it is."""
    features = layers * 2 * tasks
    generator = torch.Generator().manual_seed(seed)
    groups = [torch.randn(count, features, generator=generator) + 3 * i for i in range(tasks)]
    made = Prototypes.fit(groups)
    scaled = [group.double() / made.scale.double() for group in groups]
    within = torch.cat([group - group.mean(0) for group in scaled])
    covariance = within.mT @ within / max(1, len(within) - tasks)
    even = covariance.trace() / features if covariance.trace() > 0 else torch.tensor(1.0, dtype=torch.double)
    if min(DIRECTIONS, len(within) - tasks, features) < torch.linalg.matrix_rank(within):
        return  # the rest of the covariance is averaged
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * even * torch.eye(features)
    x = torch.randn(5, features, generator=generator)
    away = (x.double() / made.scale.double())[:, None] - torch.stack([group.mean(0) for group in scaled])
    expected = torch.einsum("btd,de,bte->bt", away, torch.linalg.inv(shrunk), away)
    torch.testing.assert_close(made.distances(x).double(), expected, rtol=2e-3, atol=2e-3)
    # all tasks as one: what is between them belongs to the covariance
    means = torch.stack([group.mean(0) for group in scaled])
    between = (means - means.mean(0)).mT @ (means - means.mean(0)) / tasks
    from_all = x.double() / made.scale.double() - means.mean(0)
    common = torch.einsum("bd,de,be->b", from_all, torch.linalg.inv(shrunk + between), from_all)
    nearest = expected.amin(1)
    remote = torch.stack([nearest, nearest - common * (tasks > 1)], dim=1)
    rounded = 2e-3 + 1e-5 * expected.max().item()  # what is subtracted is as large as the largest distance
    torch.testing.assert_close(made.remoteness(x).double(), remote, rtol=2e-3, atol=rounded)


def test_known_is_what_is_near_a_prototype_and_not_near_all() -> None:
    """Two tasks apart along one feature: what is between them, or far from both in any direction, is neither's."""
    groups = [torch.randn(400, 4) + torch.tensor([side, 0, 0, 0]) for side in (-8.0, 8.0)]
    made = Prototypes.fit(groups)
    fresh = torch.cat([torch.randn(1000, 4) + torch.tensor([side, 0, 0, 0]) for side in (-8.0, 8.0)])
    assert 0.92 < made.known(fresh).float().mean() < 0.98
    assert not made.known(torch.randn(100, 4)).any()
    for direction in torch.eye(4):
        assert not made.known(torch.stack([30 * direction, -30 * direction])).any()
    assert Prototypes.fit([group[:3] for group in groups]).known(fresh).all()  # too few to tell


def test_prototypes_find_the_optimal_boundary() -> None:
    """With one covariance for all, the nearest prototype is the most likely class."""
    mixing = torch.randn(6, 6, dtype=torch.double)
    covariance = mixing @ mixing.mT + torch.eye(6)
    means = [2 * torch.randn(6, dtype=torch.double) for _ in range(3)]
    classes = [MultivariateNormal(mean, covariance) for mean in means]
    made = Prototypes.fit([of_class.sample((4000,)).float() for of_class in classes])
    x = torch.cat([of_class.sample((500,)) for of_class in classes])
    likely = torch.stack([of_class.log_prob(x) for of_class in classes], dim=1).argmax(1)
    agreed = (made.distances(x.float()).argmin(1) == likely).float().mean()
    assert agreed > 0.95


@given(count=st.integers(1, 12), spread=st.floats(0.1, 5.0), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_nearness_and_scores_are_weighted_by_what_they_find(count: int, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tasks, layers = 3, 2
    groups = [torch.randn(count, layers * 2 * tasks, generator=generator) for _ in range(tasks)]
    for number, group in enumerate(groups):
        group[:, number] += spread  # an expert scores its own task's inputs higher
    made = Prototypes.fit(groups)
    x = torch.cat(groups)
    scored = torch.stack([x[:, [e, 2 * tasks + e]].sum(1) for e in range(tasks)], dim=1)
    torch.testing.assert_close(made.scored(x), scored)
    near, far = made.trust.tolist()
    torch.testing.assert_close(made.scores(x), far * scored - near / 2 * made.distances(x))
    assert Prototypes.parameters_for(tasks, layers, count) == sum(p.numel() for p in made.parameters())
    if count == 1:  # nothing is known of how inputs of a task differ
        assert made.trust.tolist() == [0.0, 1.0]
        return
    away, scores, _, task = Prototypes._cross_validated(groups, min(FOLDS, count))
    found, *others = (
        torch.nn.functional.cross_entropy(a * -away / 2 + b * scores, task) + 1e-3 * (a**2 + b**2)
        for a, b in (made.trust.tolist(), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.1, 0.3), (0.01, 1.0))
    )
    assert all(found <= other + 1e-4 for other in others)


def test_calibration_finds_the_task_and_is_saved(tmp_path: Path) -> None:
    model = calibrated(40)
    test = [images(i, 20) for i in range(3)]
    right = [(chosen(model, of_kind).argmax(-1) == i).float().mean() for i, of_kind in enumerate(test)]
    assert min(right) > 0.9
    before = section_of(model).recipe["parameters"]
    assert before[1] == sum(parameter.numel() for parameter in model.parameters())
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model").eval()
    everything = {"pixel_values": torch.cat(test)}
    assert torch.equal(output(loaded, everything), output(model, everything))
    calibrate(model, {name: [{"pixel_values": images(i, 4)}] for i, name in enumerate(NAMES)})  # anew, not on top
    assert section_of(model).recipe["parameters"][1] == sum(parameter.numel() for parameter in model.parameters())


def test_a_budget_leaves_room_for_calibration() -> None:
    base = clip_tower()
    experts = dict(zip(NAMES, experts_of(base), strict=True))
    ratio, options = 1.9, {"k": 12, "gate_k": 1, "routing_scope": "two_pass"}
    model = upscale(base, experts, param_ratio=ratio, calibration=9, **options)
    calibrate(model, {name: [{"pixel_values": images(i, 9)}] for i, name in enumerate(NAMES)})
    whole, found = (sum(parameter.numel() for parameter in m.parameters()) for m in (base, model))
    assert found <= ratio * whole
    assert found > 0.98 * ratio * whole
    assert section_of(model).recipe["parameters"] == [whole, found]


def test_calibration_is_by_input_and_in_batches_of_any_size() -> None:
    whole, parts = calibrated(), calibrated()
    torch.manual_seed(0)
    clip_tower(), experts_of(clip_tower())
    inputs = {name: images(i, 9) for i, name in enumerate(NAMES)}
    calibrate(whole, {name: [{"pixel_values": x}] for name, x in inputs.items()})
    calibrate(parts, {name: [{"pixel_values": part} for part in x.split(2)] for name, x in inputs.items()})
    x = torch.cat([images(i, 5) for i in range(3)])
    expected = chosen(whole, x)
    assert torch.equal(chosen(parts, x), expected)
    assert torch.equal(torch.cat([chosen(whole, one[None]) for one in x]), expected)


def test_what_is_like_no_task_gets_the_pretrained_model() -> None:
    torch.manual_seed(0)
    base = clip_tower()
    model = calibrated(40, refuse_unknown=True)
    strange = torch.linspace(-5, -3, 6)[:, None, None, None].expand(6, 3, 28, 28)  # without any grain
    known = torch.cat([images(i, 10) for i in range(3)])
    assert not chosen(model, strange).any()
    torch.testing.assert_close(output(model, {"pixel_values": strange}), output(base, {"pixel_values": strange}))
    assert chosen(model, known).any(dim=-1).float().mean() > 0.8
    mixed = torch.cat([strange[:2], known[:3]])
    assert chosen(model, mixed).any(dim=-1).tolist()[:2] == [False, False]
    trusting = calibrated(40)
    assert chosen(trusting, strange).any(dim=-1).all()


def test_refusal_needs_calibration() -> None:
    base = clip_tower()
    model = upscale(base, experts_of(base), k=4, gate_k=2, routing_scope="two_pass", refuse_unknown=True)
    with pytest.raises(RuntimeError, match="calibrate"):
        output(model, clip_inputs())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"a": [], "b": [], "c": []}, "at least one input of 'a'"),
        ({"a": [{"pixel_values": torch.randn(2, 3, 28, 28)}]}, "those of 'b' are missing"),
        ({"d": []}, "no expert 'd'"),
    ],
)
def test_calibration_refuses(inputs: dict[str, list[dict[str, Tensor]]], message: str) -> None:
    base = clip_tower()
    model = upscale(base, dict(zip(NAMES, experts_of(base), strict=True)), k=4, gate_k=2, routing_scope="two_pass")
    with pytest.raises(PlanError, match=message):
        calibrate(model, inputs)
    assert model.get_submodule(ROUTER).prototypes is None
    with pytest.raises(ConfigError, match="routing_scope=two_pass"):
        calibrate(upscale(base, experts_of(base), k=4, gate_k=2), {})


def test_a_calibrated_model_is_not_extended() -> None:
    model = calibrated()
    with pytest.raises(PlanError, match="calibration can't be changed"):
        add_expert(model, perturbed(clip_tower(), seed=9), "d")


@pytest.mark.parametrize("make", [clip_tower, t5, tied_llama])
def test_a_noise_baseline_makes_random_inputs_neutral(make, tmp_path: Path) -> None:
    base = make()
    strong = [perturbed(base, scale, seed) for seed, scale in enumerate((0.02, 0.05, 0.3), 1)]
    options = {"k": 4, "gate_k": 4, "routing_scope": "two_pass", "routing_score": "weighted"}
    plain, fair = (upscale(base, strong, noise_baseline=b, **options) for b in (False, True))
    assert section_of(fair).recipe["parameters"][1] == sum(parameter.numel() for parameter in fair.parameters())
    router, generator = fair.get_submodule(ROUTER), torch.Generator().manual_seed(7)
    entrance = fair.get_encoder() if make is t5 else fair
    scores = router.scores_of(entrance, random_inputs(fair, 300, generator))
    assert scores.mean(0).abs().max() < 0.35
    assert (scores.std(0) - 1).abs().max() < 0.35
    biased = plain.get_submodule(ROUTER).scores_of(
        plain.get_encoder() if make is t5 else plain, random_inputs(plain, 300, torch.Generator().manual_seed(7))
    )
    assert biased.mean(0).std() > 0
    save(fair, tmp_path / "model")
    again = load(tmp_path / "model").get_submodule(ROUTER)
    assert torch.equal(again.baseline, router.baseline)


def test_random_inputs_are_known_for_some_models_only() -> None:
    base = mlp()
    with pytest.raises(PlanError, match="noise_baseline"):
        upscale(base, experts_of(base), k=4, gate_k=2, routing_scope="two_pass", noise_baseline=True)


@pytest.mark.parametrize("make", [clip_tower, t5, tied_llama])
@pytest.mark.parametrize("execution", ["grouped", "masked"])
def test_all_of_an_expert_is_lossless(make, execution: str, tmp_path: Path) -> None:
    """With full rank, and norms and embeddings its own, the chosen expert's model is the fine-tuned one."""
    base = make()
    experts = [perturbed(base, 0.05, seed) for seed in (1, 2)]
    for expert in experts:  # what can't be owned: bare parameters, convolutions, biases of pairs of tokens
        for name, parameter in expert.named_parameters():
            if name.endswith(("class_embedding", "patch_embedding.weight", "relative_attention_bias.weight")):
                parameter.data.copy_(base.get_parameter(name))
    options = {"k": 64, "gate_k": 2, "routing_scope": "two_pass", "expert_parameters": "all"}
    if make is tied_llama:
        options["exclude_modules"] = ["lm_head"]
        for expert in experts:
            expert.model.embed_tokens.weight.data.copy_(base.model.embed_tokens.weight)
    largest = {clip_tower: 32, t5: 32, tied_llama: 16}[make]
    model = upscale(base, experts, execution=execution, **{**options, "k": largest})
    assert section_of(model).recipe["parameters"][1] == sum(parameter.numel() for parameter in model.parameters())
    inputs = clip_inputs() if make is clip_tower else {"input_ids": torch.randint(1, 40, (4, 6))}
    if make is t5:
        inputs["decoder_input_ids"] = torch.randint(1, 40, (4, 3))
    for number, expert in enumerate(experts):
        with as_expert(model, str(number)):
            torch.testing.assert_close(output(model, inputs), output(expert, inputs), atol=2e-4, rtol=2e-4)
    free = output(model, inputs)
    each = [output(expert, inputs) for expert in experts]
    for row, best in enumerate(model.get_submodule(ROUTER).choice.argmax(-1).tolist()):  # of a mixed batch
        torch.testing.assert_close(free[row], each[best][row], atol=2e-4, rtol=2e-4)
    save(model, tmp_path / "model")
    assert torch.equal(output(load(tmp_path / "model").eval(), inputs), free)


def test_norms_alone_or_with_embeddings() -> None:
    base = t5()
    options = {"k": 8, "gate_k": 2, "routing_scope": "two_pass"}
    kinds = {kind: owned(upscale(base, experts_of(base), expert_parameters=kind, **options)) for kind in
             ("layers", "norms", "all")}  # fmt: skip
    assert not kinds["layers"]
    assert kinds["norms"]
    assert all("norm" in name for name in kinds["norms"])
    assert set(kinds["all"]) - set(kinds["norms"])
    assert set(kinds["norms"]) < set(kinds["all"])


def test_what_is_a_norm() -> None:
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    for norm in (nn.LayerNorm(8), nn.LayerNorm(8, bias=False), nn.RMSNorm(8), T5LayerNorm(8)):
        nn.init.normal_(norm.weight)
        assert is_norm(norm)
    others = (
        nn.BatchNorm1d(8),
        nn.GroupNorm(2, 8),
        nn.Linear(8, 8),
        nn.PReLU(8),
        nn.LayerNorm(8, elementwise_affine=False),
    )
    assert not any(is_norm(other.eval()) for other in others)


def test_the_inputs_of_the_models_are_not_touched() -> None:
    base = clip_tower()
    experts = experts_of(base)
    before = [copy.deepcopy(model.state_dict()) for model in (base, *experts)]
    model = upscale(base, experts, k=8, gate_k=2, routing_scope="two_pass", expert_parameters="all")
    output(model, clip_inputs())
    for model, kept in zip((base, *experts), before, strict=True):
        assert not model._forward_hooks
        assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
