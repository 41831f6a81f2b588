"""Calibration inputs: what training examples may be, and how they are batched."""

from __future__ import annotations

import torch
from fusion_bench.modelpool import BaseModelPool
from PIL import Image
from transformers import CLIPImageProcessor

from fusion_bench_smile.framework import calibration_inputs
from fusion_bench_smile.framework.model_pools import BATCH_SIZE, model_inputs


def test_training_examples_of_several_forms():
    ids = {"input_ids": [4, 5], "attention_mask": [1, 1], "labels": [0]}
    inputs = model_inputs(BaseModelPool({}), ids, "a")
    assert {key: value.tolist() for key, value in inputs.items()} == {"input_ids": [[4, 5]], "attention_mask": [[1, 1]]}

    class WithProcessor(BaseModelPool):
        def load_processor(self):
            return CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})

    image = Image.new("RGB", (40, 30), "red")
    expected = WithProcessor({}).load_processor()(images=image, return_tensors="pt")["pixel_values"]
    for example in ({"image": image, "label": 3}, (image, 3)):  # of the datasets library, of torchvision
        assert torch.equal(model_inputs(WithProcessor({}), example, "a")["pixel_values"], expected)


def test_neighbours_of_one_shape_are_a_batch():
    lengths = [3] * (BATCH_SIZE + 2) + [5] * 2 + [3]
    tokens = [[number] * length for number, length in enumerate(lengths)]
    examples = {"_target_": "datasets.Dataset.from_dict", "_convert_": "all", "mapping": {"input_ids": tokens}}
    pool = BaseModelPool({}, train_datasets={"a": examples})
    (batches,) = calibration_inputs(pool, ["a"], len(lengths)).values()
    drawn = [int(row[0]) for batch in batches for row in batch["input_ids"]]
    assert drawn == torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist()
    assert max(len(batch["input_ids"]) for batch in batches) <= BATCH_SIZE
    assert len(batches) < len(lengths)
