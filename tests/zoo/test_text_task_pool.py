"""The task pool for text classification, on the encoder and the tasks of the text benchmark."""

from __future__ import annotations

import pytest
import torch
from command_line import on_one_and_two_processes
from datasets import Dataset
from safetensors.torch import save_file
from torch import nn

from fusion_bench_smile.exceptions import SmileError
from smile_zoo.heads import Head
from smile_zoo.text import TASKS, load_head, load_pretrained, load_texts, load_tokenizer
from smile_zoo.text.evaluate import accuracy
from smile_zoo.text.task_pool import TextClassificationTaskPool, mean_pooled_embeddings, tokenize_batch


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    return load_pretrained().eval()


def test_the_mean_ignores_padding(encoder):
    tokenizer = load_tokenizer()
    with torch.inference_mode():
        together = mean_pooled_embeddings(
            encoder, tokenize_batch(tokenizer, ["a fox", "a much longer text about some other animal"])
        )
        alone = mean_pooled_embeddings(encoder, tokenize_batch(tokenizer, ["a fox"]))
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)


def test_pairs_are_read_as_pairs(encoder):
    batch = tokenize_batch(load_tokenizer(), [("fox", "an animal"), ("oak", "a tree of the genus Quercus")])
    assert set(batch["token_type_ids"].unique().tolist()) == {0, 1}


def pool(head: Head, rows: dict[str, list], **options) -> TextClassificationTaskPool:
    return TextClassificationTaskPool(
        load_tokenizer(), {"some": {"dataset": Dataset.from_dict(rows), "head": head}}, **options
    )


def test_a_task_pool_counts(encoder):
    rows = {name: column[:30] for name, column in load_texts("glosses").to_dict().items()}
    head = load_head("glosses")
    report = pool(head, rows, batch_size=7).evaluate(encoder)
    expected = accuracy(encoder, load_tokenizer(), head, rows["text"], torch.tensor(rows["label"])) / 100
    assert 0.5 < expected < 1
    assert report["some"] == {"accuracy": pytest.approx(expected), "samples": 30}
    assert report["average"]["accuracy"] == report["some"]["accuracy"]
    assert pool(head, rows, batch_size=7, fast_dev_run=True).evaluate(encoder)["some"]["samples"] == 7


def test_a_task_pool_says_what_is_wrong(encoder, tmp_path):
    head = Head(torch.zeros(2, 384), torch.zeros(2))
    cases = {
        "no column 'label'": (head, {"text": ["a"]}),
        "is empty": (head, {"text": [], "label": []}),
        "the head has 2 classes, a label is 5": (head, {"text": ["a"], "label": [5]}),
        "the head takes 7 values, got 384": (Head(torch.zeros(2, 7), torch.zeros(2)), {"text": ["a"], "label": [0]}),
    }
    for message, (given, rows) in cases.items():
        with pytest.raises(SmileError, match=message):
            pool(given, rows).evaluate(encoder)
    save_file({"bias": torch.zeros(2)}, tmp_path / "half.safetensors")
    for file in ("half.safetensors", "missing.safetensors"):
        with pytest.raises(SmileError, match="is no classification head"):
            pool(str(tmp_path / file), {"text": ["a"], "label": [0]}).evaluate(encoder)


@pytest.mark.cli
def test_one_process_and_two_give_the_same_report(tmp_path):
    few = [f"~{group}.{task}" for task in TASKS[2:] for group in ("modelpool.models", "taskpool.tasks")]
    common = ["modelpool=SmileText/lora", "taskpool=SmileText/lora", "++split=validation", "taskpool.batch_size=77"]
    one, two = on_one_and_two_processes(
        "method=smile_upscaling", "method.gate_k=2", "method.k=2", *common, *few, folder=tmp_path
    )
    assert one == two
    assert one["sections"]["samples"] == 300
    assert 0.5 < one["average"]["accuracy"] < 0.95
