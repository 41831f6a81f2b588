"""Calibrated routing: prototypes of each task's inputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import clip_inputs, clip_tower, experts_of, output, perturbed
from torch import Tensor, nn

from fusion_bench_smile import (
    ConfigError,
    PlanError,
    SmileConfig,
    add_expert,
    calibrate,
    choose_experts,
    load,
    metadata_of,
    save,
    upscale,
)
from fusion_bench_smile.construction import check_calibration
from fusion_bench_smile.nn import SCORED_ROWS, count_bytes, count_parameters, router_of

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
    model = upscale(base, experts, **{"k": 8, "gate_k": 4, "routing_scope": "input", **options})
    calibrate(model, {name: [{"pixel_values": images(i, count)}] for i, name in enumerate(NAMES)})
    return model


def choice_for(model: nn.Module, inputs: Tensor) -> Tensor:
    return choose_experts(model, pixel_values=inputs)


def test_calibration_finds_the_task_and_is_saved(tmp_path: Path) -> None:
    model = calibrated(40)
    test = [images(i, 20) for i in range(3)]
    accuracies = [(choice_for(model, x).argmax(-1) == i).float().mean() for i, x in enumerate(test)]
    assert min(accuracies) > 0.9
    assert metadata_of(model).provenance.parameters[1] == count_parameters(model)
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model").eval()
    inputs = {"pixel_values": torch.cat(test)}
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    calibrate(model, {name: [{"pixel_values": images(i, 4)}] for i, name in enumerate(NAMES)})  # replaces the first one
    assert metadata_of(model).provenance.parameters[1] == count_parameters(model)


def test_prototypes_of_an_earlier_version_are_those_of_all_router_rows(tmp_path: Path) -> None:
    model = calibrated(40, k=24, gate_k=24)
    router, x = router_of(model), torch.cat([images(i, 5) for i in range(3)])
    assert router.prototypes.rows == SCORED_ROWS < 24
    save(model, tmp_path / "new")
    assert torch.equal(choice_for(load(tmp_path / "new").eval(), x), choice_for(model, x))
    router.prototypes.rows = None
    calibrate(model, {name: [{"pixel_values": images(i, 40)}] for i, name in enumerate(NAMES)})
    assert router.prototypes.rows is None
    save(model, tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    del config["quantization_config"]["router"]["scored_rows"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    (tmp_path / "old" / "smile_digests.json").unlink()
    loaded = load(tmp_path / "old").eval()
    assert router_of(loaded).prototypes.rows is None
    assert torch.equal(choice_for(loaded, x), choice_for(model, x))


@pytest.mark.parametrize(
    ("budget", "ratio", "storage"),
    [("param_ratio", 1.9, "same"), ("byte_ratio", 1.9, "same"), ("byte_ratio", 1.25, "int4")],
)
def test_a_budget_leaves_room_for_calibration(budget: str, ratio: float, storage: str) -> None:
    base = clip_tower()
    experts = dict(zip(NAMES, experts_of(base), strict=True))
    options = {"k": 12, "gate_k": 1, "routing_scope": "input", "storage": storage}
    model = upscale(base, experts, **{budget: ratio}, calibration=9, **options)
    calibrate(model, {name: [{"pixel_values": images(i, 9)}] for i, name in enumerate(NAMES)})
    count = count_parameters if budget == "param_ratio" else count_bytes
    assert 0.95 * ratio * count(base) < count(model) <= ratio * count(base)
    assert metadata_of(model).provenance.parameters == (count_parameters(base), count_parameters(model))


def test_inputs_are_independent_and_come_in_batches_of_any_size() -> None:
    whole, parts = calibrated(), calibrated()
    torch.manual_seed(0)
    clip_tower(), experts_of(clip_tower())
    inputs = {name: images(i, 9) for i, name in enumerate(NAMES)}
    calibrate(whole, {name: [{"pixel_values": x}] for name, x in inputs.items()})
    calibrate(parts, {name: [{"pixel_values": part} for part in x.split(2)] for name, x in inputs.items()})
    x = torch.cat([images(i, 5) for i in range(3)])
    expected = choice_for(whole, x)
    assert torch.equal(choice_for(parts, x), expected)
    assert torch.equal(torch.cat([choice_for(whole, one[None]) for one in x]), expected)


def test_unknown_inputs_get_the_pretrained_model() -> None:
    torch.manual_seed(0)
    base = clip_tower()
    model = calibrated(40, refuse_unknown=True)
    unknown = torch.linspace(-5, -3, 6)[:, None, None, None].expand(6, 3, 28, 28)  # without any grain
    known = torch.cat([images(i, 10) for i in range(3)])
    assert not choice_for(model, unknown).any()
    torch.testing.assert_close(output(model, {"pixel_values": unknown}), output(base, {"pixel_values": unknown}))
    assert choice_for(model, known).any(dim=-1).float().mean() > 0.8
    mixed = torch.cat([unknown[:2], known[:3]])
    assert choice_for(model, mixed).any(dim=-1).tolist()[:2] == [False, False]
    without_refusal = calibrated(40)
    assert choice_for(without_refusal, unknown).any(dim=-1).all()


def test_refusal_needs_calibration() -> None:
    base = clip_tower()
    model = upscale(base, experts_of(base), k=4, gate_k=2, routing_scope="input", refuse_unknown=True)
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
    model = upscale(base, dict(zip(NAMES, experts_of(base), strict=True)), k=4, gate_k=2, routing_scope="input")
    with pytest.raises(PlanError, match=message):
        calibrate(model, inputs)
    assert router_of(model).prototypes is None
    with pytest.raises(ConfigError, match="routing_scope=input"):
        calibrate(upscale(base, experts_of(base), k=4, gate_k=2), {})


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (-1, {}, "calibration=-1 is not a number"),
        (True, {}, "calibration=True is not a number"),
        ("4", {}, "calibration='4' is not a number"),
        (4, {}, "calibration=4 needs routing_scope=input; it is token"),
        (0, {"refuse_unknown": True, "routing_scope": "input"}, "refuse_unknown=true needs calibration"),
    ],
)
def test_a_number_of_inputs_that_cannot_work_is_refused(inputs, options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        check_calibration(inputs, SmileConfig(**options))
    check_calibration(0, SmileConfig())
    check_calibration(4, SmileConfig(routing_scope="input", refuse_unknown=True))


def test_a_calibrated_model_is_not_extended() -> None:
    model = calibrated()
    with pytest.raises(PlanError, match="calibration can't be changed"):
        add_expert(model, perturbed(clip_tower(), seed=9), "d")
