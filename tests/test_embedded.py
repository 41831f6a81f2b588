"""The embedded benchmark: what is shipped is what the pages say it is."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from fusion_bench.tasks.clip_classification import get_classnames_and_templates
from safetensors.torch import load_file
from transformers import CLIPProcessor

from fusion_bench_smile import upscale
from fusion_bench_smile.embedded import DATA, STRENGTHS, TASKS, Pixels, load_expert, load_images, load_pretrained
from fusion_bench_smile.embedded.comparison import BENCHMARKS
from fusion_bench_smile.embedded.measure import accuracies, relative_deltas, router_accuracy


@pytest.mark.parametrize("task", TASKS)
def test_images_and_class_names(task):
    classnames, templates = get_classnames_and_templates(task)
    assert len(set(classnames)) == len(classnames)
    assert all(name in template(name) for name in classnames for template in templates)
    for split, count in {"train": 150, "validation": 300, "test": 600}.items():
        images = load_images(task, split)
        assert len(images) == count
        assert images[0]["image"].size == (28, 28)
        assert set(images["label"]) <= set(range(len(classnames)))
    assert set(load_images(task, "test")["label"]) == set(range(len(classnames)))


def test_no_image_is_in_two_splits():
    for task in TASKS:
        seen = [
            {np.asarray(i).tobytes() for i in load_images(task, s)["image"]} for s in ("train", "validation", "test")
        ]
        shared = [len(a & b) for a, b in ((seen[0], seen[1]), (seen[0], seen[2]), (seen[1], seen[2]))]
        assert max(shared) <= 6, (task, shared)  # the collections themselves hold a few images twice


def test_pixels_are_what_the_processor_makes():
    processor = CLIPProcessor.from_pretrained(DATA / "clip", use_fast=False)
    for task in ("digits", "flags"):
        image = load_images(task, "test")[3]["image"]
        theirs = processor(images=[image.convert("RGB")], return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(Pixels()(image), theirs, rtol=0, atol=1e-6)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="the tasks are digits"):
        load_images("numbers")
    with pytest.raises(ValueError, match="the strengths are gentle, strong"):
        load_expert("digits", "weak")


@pytest.mark.parametrize("strength", STRENGTHS)
def test_experts_are_the_pretrained_model_plus_their_adapter(strength):
    pretrained, expert = load_pretrained(), load_expert("digits", strength)
    assert {n: p.shape for n, p in expert.named_parameters()} == {n: p.shape for n, p in pretrained.named_parameters()}
    adapter = load_file(DATA / strength / "digits" / "adapter_model.safetensors")
    rank = json.loads((DATA / strength / "digits" / "adapter_config.json").read_text())["r"]
    name = "vision_model.encoder.layers.0.mlp.fc1"
    down, up = (adapter[f"base_model.model.{name}.lora_{x}.weight"].float() for x in "AB")
    delta = expert.get_submodule(name).weight - pretrained.get_submodule(name).weight
    torch.testing.assert_close(delta, up @ down, rtol=1e-4, atol=1e-5)
    assert torch.linalg.matrix_rank(delta.double(), rtol=1e-4) <= rank


def test_every_expert_is_best_at_home():
    """On its own task an expert beats the pretrained model clearly."""
    models = {"pretrained": load_pretrained().eval(), "digits": load_expert("digits").eval()}
    table = accuracies(models, "validation")
    assert table.loc["digits", "digits"] > table.loc["pretrained", "digits"] + 10


def test_router_accuracy_of_an_oracle_is_one():
    """Two experts that differ in nothing but which inputs they see: the measure itself is checked on a sure case."""
    base = load_pretrained().eval()
    experts = {task: copy.deepcopy(base) for task in TASKS}
    with torch.no_grad():
        for parameter in experts["planets"].parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    shares = router_accuracy(upscale(base, experts, gate_k=4, k=4).eval(), "validation", count=5)
    assert shares["planets"] == 100
    assert shares.drop("planets").max() == 0


def test_relative_deltas():
    base = load_pretrained()
    other = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)
    assert relative_deltas(base, other).tolist() == pytest.approx([25.0] * 24, rel=1e-5)


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=lambda benchmark: benchmark.name)
def test_the_comparison_runs_every_row_of_every_set(benchmark):
    for chosen in benchmark.sets:
        commands = benchmark.commands(chosen)
        assert all(c[:3] == ["fusion_bench", "-m", f"+experiment={benchmark.experiments}/{chosen}"] for c in commands)
        assert commands[0][3] == f"+smile_row={','.join(benchmark.rows)}"
    assert {"individual", "task_arithmetic", "ties_merging"} <= set(benchmark.rows)
