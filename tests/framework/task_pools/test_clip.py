"""The CLIP task pool: every sample counts once, on one process and on two with an uneven number of samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from command_line import fusion_bench, image_pools, on_one_and_two_processes
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor

from smile_zoo.images import DATA, load_images
from smile_zoo.images.evaluate import Classifier, to_pixels, zero_shot_head

pytestmark = pytest.mark.cli

SAMPLES = {"clothes": 7, "letters": 11}


@torch.no_grad()
def expected(task: str, count: int) -> tuple[float, float]:
    """Accuracy and loss of the pretrained model, without any task pool."""
    clip = CLIPModel.from_pretrained(DATA / "clip").eval()
    head = zero_shot_head(clip, CLIPProcessor.from_pretrained(DATA / "clip"), task)
    rows = [load_images(task)[number] for number in range(count)]
    pixels = torch.cat([to_pixels(np.asarray(row["image"].convert("RGB"))[None]) for row in rows])
    labels = torch.tensor([row["label"] for row in rows])
    logits = Classifier(clip, clip.vision_model, head)(pixels)
    return float((logits.argmax(1) == labels).double().mean()), float(F.cross_entropy(logits, labels))


def test_uneven_shares_count_every_sample_once(tmp_path):
    common = [*image_pools(tmp_path, SAMPLES, batch_size=3), "method=dummy"]
    one, two = on_one_and_two_processes(*common, folder=tmp_path)
    assert {task: one[task] for task in SAMPLES} == {task: two[task] for task in SAMPLES}
    assert one["average"] == two["average"]
    for task, count in SAMPLES.items():
        accuracy, loss = expected(task, count)
        assert 0 < accuracy < 1, "a repeated sample would not show"
        assert two[task]["accuracy"] == pytest.approx(accuracy, abs=1e-12)
        assert two[task]["loss"] == round(loss, 3)
        assert two[task]["samples"] == count


def test_the_published_tasks_differ_from_the_frameworks_in_the_class_alone(tmp_path):
    for tasks in ("TA8", "TALL14", "TALL20"):
        common = ["--cfg", "job", "--package", "taskpool", "method=dummy"]
        ours, original = (
            fusion_bench(*common, f"taskpool={pool}", cwd=tmp_path).stdout.splitlines()
            for pool in (f"SmileCLIP/{tasks}", f"CLIPVisionModelTaskPool/clip-vit-classification_{tasks}")
        )
        assert len(original) > 20
        added = "layer_wise_routing_weights_save_path", "layer_wise_routing_weights_max_num", "linear_module_names"
        for option in added:
            ours.remove(f"{option}: null")  # of the framework's SmileCLIPVisionModelTaskPool
        assert [pair for pair in zip(ours, original, strict=True) if pair[0] != pair[1]] == [
            (
                "_target_: fusion_bench_smile.framework.task_pools.ExactCLIPVisionModelTaskPool",
                "_target_: fusion_bench.taskpool.CLIPVisionModelTaskPool",
            )
        ]
