"""The tiny T5 and its tasks in GLUE's form: the framework's Flan-T5 path without a network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import on_one_and_two_processes
from hydra.utils import instantiate
from omegaconf import OmegaConf

import smile_zoo
from fusion_bench_smile import SmileUpscalingAlgorithm, choose_experts
from fusion_bench_smile.exceptions import SmileError
from fusion_bench_smile.framework.task_pools import GlueTextTaskPool, glue_examples
from smile_zoo.tiny_t5 import (
    DATA,
    TASKS,
    expert_folder,
    load_expert,
    load_inputs,
    load_pretrained,
    load_sentences,
    load_tokenizer,
)

CONFIG = Path(smile_zoo.__file__).parent / "config"


@pytest.mark.parametrize("task", TASKS)
def test_sentences_have_glues_columns(task):
    tokenizer = load_tokenizer()
    train, validation = load_sentences(task, "train"), load_sentences(task)
    assert train.column_names == validation.column_names
    assert len(validation) == 400
    prompts = {
        split: {prompt for prompt, _ in glue_examples(task, data)} for split, data in (("a", train), ("b", validation))
    }
    assert len(prompts["a"] & prompts["b"]) <= 4
    prompt, answer = glue_examples(task, validation)[0]
    assert tokenizer.unk_token_id not in tokenizer(prompt).input_ids
    assert tokenizer.decode(tokenizer(answer).input_ids, skip_special_tokens=True) == answer


def test_an_expert_is_better_on_its_task_and_keeps_the_embeddings():
    data = {"sst2": load_sentences("sst2")}
    scores = []
    for model in (load_pretrained(), load_expert("sst2")):
        scores.append(GlueTextTaskPool(load_tokenizer(), data, batch_size=200).evaluate(model)["average"]["score"])
    assert scores[1] > scores[0] + 0.05
    assert torch.equal(load_pretrained().shared.weight, load_expert("sst2").shared.weight)


def test_the_loader_names_its_adapter():
    assert load_expert.lazy_source(task="cola") == expert_folder("cola")


def test_unknown_names_are_refused():
    with pytest.raises(SmileError, match="the tasks are cola"):
        load_sentences("wnli")
    with pytest.raises(SmileError, match="the tasks are cola"):
        load_expert("wnli")


def test_the_configurations_name_all_tasks():
    models = OmegaConf.load(CONFIG / "modelpool" / "SmileGLUE" / "tiny-t5.yaml").models
    tasks = OmegaConf.load(CONFIG / "taskpool" / "SmileGLUE" / "tiny-t5.yaml").test_datasets
    assert list(models) == ["_pretrained_", *(f"glue-{task}" for task in TASKS)]
    assert list(tasks) == [f"glue-{task}" for task in TASKS]
    assert all(models[f"glue-{t}"].task == tasks[f"glue-{t}"].task == t for t in TASKS)
    assert all((DATA / "experts" / task / "adapter_model.safetensors").exists() for task in TASKS)


@pytest.mark.cli
def test_one_process_and_two_give_the_same_report(tmp_path):
    few = [f"~taskpool.test_datasets.glue-{task}" for task in TASKS if task not in ("rte", "stsb")]
    common = ["modelpool=SmileGLUE/tiny-t5", "taskpool=SmileGLUE/tiny-t5", "method.gate_k=4", "method.k=8"]
    one, two = on_one_and_two_processes("method=smile_upscaling", *common, *few, folder=tmp_path)
    assert one == two
    assert one["glue-rte"]["samples"] == one["glue-stsb"]["samples"] == 400


def test_the_t5_is_calibrated_by_its_training_prompts():
    pool = instantiate(OmegaConf.load(CONFIG / "modelpool" / "SmileGLUE" / "tiny-t5.yaml"))
    options = {"gate_k": 4, "k": 8, "routing_scope": "input", "calibration": 16}
    model = SmileUpscalingAlgorithm(**options).run(pool)
    right = []
    for number, task in enumerate(TASKS):
        for example in load_inputs(task, "validation").select(range(12)):
            inputs = {key: torch.tensor(value)[None] for key, value in example.items()}
            right.append(choose_experts(model, **inputs).argmax().item() == number)
    assert sum(right) > 0.8 * len(right)  # the prompts of most tasks begin alike
