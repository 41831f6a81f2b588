"""The image benchmark: data, experts and the comparison are as documented."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from fusion_bench.tasks.clip_classification import get_classnames_and_templates
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPProcessor

from smile_zoo.comparison import BENCHMARKS
from smile_zoo.images import DATA, STRENGTHS, TASKS, Pixels, expert_folder, load_expert, load_images, load_pretrained
from smile_zoo.images.evaluate import Classifier, accuracy, to_pixels, zero_shot_head


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
        images = [
            {np.asarray(i).tobytes() for i in load_images(task, s)["image"]} for s in ("train", "validation", "test")
        ]
        shared = [len(images[i] & images[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
        assert max(shared) <= 6, (task, shared)  # the collections themselves hold a few images twice


def test_pixels_equal_those_of_the_processor():
    processor = CLIPProcessor.from_pretrained(DATA / "clip", use_fast=False)
    for task in ("digits", "flags"):
        image = load_images(task, "test")[3]["image"]
        expected = processor(images=[image.convert("RGB")], return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(Pixels()(image), expected, rtol=0, atol=1e-6)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="the tasks are digits"):
        load_images("numbers")
    with pytest.raises(ValueError, match="the strengths are gentle"):
        load_expert("digits", "weak")


def test_the_loader_names_its_adapter():
    assert load_expert.lazy_source("digits", strength="gentle") == expert_folder("digits", "gentle")
    assert (expert_folder("digits") / "adapter_model.safetensors").exists()


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


def test_an_expert_is_better_on_its_task():
    clip = CLIPModel.from_pretrained(DATA / "clip", torch_dtype=torch.float32).eval()
    head = zero_shot_head(clip, CLIPProcessor.from_pretrained(DATA / "clip", use_fast=False), "digits")
    images = load_images("digits", "validation")
    pixels, labels = to_pixels(np.stack([np.asarray(i) for i in images["image"]])), torch.tensor(images["label"])
    models = (load_pretrained(), load_expert("digits"))
    before, after = (100 * accuracy(Classifier(clip, model.eval(), head), pixels, labels) for model in models)
    assert after > before + 10


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=lambda benchmark: benchmark.name)
def test_the_comparison_runs_every_row_of_every_set(benchmark):
    for expert_set in benchmark.expert_sets:
        commands = benchmark.commands(expert_set)
        experiment = f"+experiment={benchmark.experiments}/{expert_set}"
        assert all(command[:3] == ["fusion_bench", "-m", experiment] for command in commands)
        assert commands[0][3] == f"+smile_row={','.join(benchmark.rows)}"
    assert {"individual", "task_arithmetic"} <= set(benchmark.rows)
