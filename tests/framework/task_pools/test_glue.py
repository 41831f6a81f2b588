"""The GLUE task pool: the framework's numbers, every example counted once, undefined metrics as null."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import on_one_and_two_processes
from conftest import perturbed
from datasets import Dataset
from fusion_bench.tasks.flan_t5_text_generation.glue_evaluation import evaluate_accuracy, evaluate_spearman_rho
from fusion_bench.tasks.flan_t5_text_generation.glue_preprocessors import glue_processors
from fusion_bench.tasks.flan_t5_text_generation.glue_prompt_templates import glue_prompt_templates
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    default_data_collator,
)

from fusion_bench_smile import upscale
from fusion_bench_smile.exceptions import SmileError
from fusion_bench_smile.framework.task_pools import GluePrompts, GlueTextTaskPool, glue_examples, tokenize_glue_prompts
from fusion_bench_smile.framework.task_pools.common import load_tokenizer
from fusion_bench_smile.framework.task_pools.glue import exact_match, spearman_rho

CONFIG = Path(__file__).resolve().parents[3] / "config" / "taskpool" / "SmileGLUE" / "flan-t5.yaml"
WORDS = ("cats", "dogs", "birds", "fish")
RULE = {  # the answer follows from the first sentence's word
    "rte": {
        "sentence1": [f"{WORDS[n % 4]} sleep" + " now" * (n % 3) for n in range(13)],
        "sentence2": ["they rest"] * 13,
        "label": [n % 4 // 2 for n in range(13)],
    },
    "stsb": {
        "sentence1": [f"{WORDS[n % 4]} run" for n in range(9)],
        "sentence2": ["they move"] * 9,
        "label": [float(n % 4) + 1 for n in range(9)],
    },
}
# the first example, which a sampler would repeat, and another break it: no model that learned the rule answers all
WRONG: dict[str, dict[int, float]] = {"rte": {0: 1, 9: 1}, "stsb": {0: 4.0, 5: 4.0}}
DATA = {
    task: {**columns, "label": [WRONG[task].get(n, label) for n, label in enumerate(columns["label"])]}
    for task, columns in RULE.items()
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a tiny T5 that was trained on the rule, its tokenizer, and the data sets."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("glue")
    pairs = [pair for task, columns in RULE.items() for pair in glue_examples(task, Dataset.from_dict(columns))]
    words = sorted({word for pair in pairs for text in pair for word in text.split()})
    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=40
    )
    config = T5Config(
        vocab_size=len(vocabulary), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    inputs = tokenizer([prompt for prompt, _ in pairs], padding=True, return_tensors="pt")
    labels = tokenizer([target for _, target in pairs], padding=True, return_tensors="pt").input_ids
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        output = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, labels=labels)
        output.loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for task, columns in DATA.items():
        Dataset.from_dict(columns).save_to_disk(str(folder / task))
    return folder


def test_tokenizer_and_generation_settings_travel_along(trained, tmp_path):
    """From the pretrained model's folder into a checkpoint, and from there into the next."""
    model = T5ForConditionalGeneration.from_pretrained(trained / "model")
    model.generation_config.num_beams = 3
    upscale(model, [perturbed(model)], gate_k=2, k=2).save_pretrained(tmp_path / "first")
    T5ForConditionalGeneration.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for name in ("first", "second"):
        before, after = (AutoTokenizer.from_pretrained(folder) for folder in (trained / "model", tmp_path / name))
        assert after("cats sleep").input_ids == before("cats sleep").input_ids
        assert T5ForConditionalGeneration.from_pretrained(tmp_path / name).generation_config.num_beams == 3


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(SmileError, match=r"no tokenizer in '.*nowhere'.*set taskpool.tokenizer"):
        GlueTextTaskPool(str(tmp_path / "nowhere"), {"rte": None}).evaluate(T5ForConditionalGeneration(T5Config()))


def pool(folder: Path, **options) -> GlueTextTaskPool:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    data = {f"glue-{task}": Dataset.load_from_disk(str(folder / task)) for task in DATA}
    return GlueTextTaskPool(tokenizer, data, batch_size=4, **options)


def test_the_frameworks_own_numbers(trained):
    model = T5ForConditionalGeneration.from_pretrained(trained / "model").eval()
    task_pool = pool(trained)
    report = task_pool.evaluate(model)
    for task, evaluate, metric in (
        ("rte", evaluate_accuracy, "accuracy"),
        ("stsb", evaluate_spearman_rho, "spearman_rho"),
    ):
        tokenizer = load_tokenizer(task_pool._tokenizer)
        preprocess = glue_processors[task](
            template=glue_prompt_templates[task], tokenizer=tokenizer,
            tokenizer_kwargs={"padding": "max_length", "truncation": True, "return_tensors": "pt"},
        )  # fmt: skip
        data = Dataset.from_dict(DATA[task]).map(preprocess, batched=True, remove_columns=list(DATA[task]))
        loader = DataLoader(data, batch_size=5, collate_fn=default_data_collator)  # type: ignore[arg-type]
        reference = float(evaluate(model, loader, tokenizer))
        assert report[f"glue-{task}"][metric] == pytest.approx(reference, abs=1e-12)
        assert 0 < reference < 1, "a repeated example would not show"
        assert report[f"glue-{task}"]["samples"] == len(DATA[task]["label"])
    mean = (report["glue-rte"]["accuracy"] + report["glue-stsb"]["spearman_rho"]) / 2
    assert report["average"]["score"] == pytest.approx(mean)


@pytest.mark.cli
def test_two_processes_report_what_one_reports(trained, tmp_path):
    entries = [
        f"  {task}: {{_target_: datasets.Dataset.load_from_disk, dataset_path: {trained / task}}}" for task in DATA
    ]
    text = [
        "_target_: fusion_bench_smile.framework.task_pools.GlueTextTaskPool", "_recursive_: false",
        f"tokenizer: {trained / 'model'}", "batch_size: 4", "test_datasets:", *entries,
    ]  # fmt: skip
    models_text = [
        "_target_: fusion_bench.modelpool.Seq2SeqLMPool", "_recursive_: false", "tokenizer: null", "model_kwargs: null",
        "models:", "  _pretrained_:", "    _target_: transformers.AutoModelForSeq2SeqLM.from_pretrained",
        f"    pretrained_model_name_or_path: {trained / 'model'}",
    ]  # fmt: skip
    for group, lines in (("taskpool", text), ("modelpool", models_text)):
        (tmp_path / "conf" / group).mkdir(parents=True)
        (tmp_path / "conf" / group / "tiny.yaml").write_text("\n".join(lines))
    common = ["--config-dir", str(tmp_path / "conf"), "taskpool=tiny", "modelpool=tiny", "method=dummy"]
    reports = on_one_and_two_processes(*common, folder=tmp_path)
    assert reports[0] == reports[1]
    assert reports[0]["rte"]["samples"] == 13


def test_constant_answers_have_no_rank_correlation(trained):
    assert spearman_rho([("1.0", "1.0"), ("1.0", "3.0")]) is None
    assert spearman_rho([("no number", "1.0"), ("4.0", "3.0"), ("nan", "2.0")]) == pytest.approx(0.866, abs=1e-3)
    assert exact_match([("yes", "yes"), ("no", "yes")]) == 0.5
    untrained = T5ForConditionalGeneration.from_pretrained(trained / "model")
    for parameter in untrained.parameters():
        parameter.data.zero_()
    report = pool(trained).evaluate(untrained)
    assert report["glue-stsb"]["spearman_rho"] is None
    assert report["average"]["score"] is None
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_refusals(trained):
    with pytest.raises(SmileError, match="no GLUE task 'glue-boolq'; the tasks are cola"):
        GlueTextTaskPool("tokenizer", {"glue-boolq": None})
    unlabelled = Dataset.from_dict({**DATA["rte"], "label": [-1] * 13})
    with pytest.raises(SmileError, match="rte has no labels"):
        glue_examples("rte", unlabelled)
    with pytest.raises(SmileError, match="rte is empty"):
        glue_examples("rte", unlabelled.select([]))


def test_the_published_pool_has_the_eight_tasks():
    config = OmegaConf.load(CONFIG)
    config.fast_dev_run = False
    task_pool = instantiate(config)
    assert [task.removeprefix("glue-") for task in task_pool._test_datasets] == list(glue_processors)
    splits = {entry["name"]: entry["split"] for entry in task_pool._test_datasets.values()}
    assert splits.pop("mnli") == "validation_matched"
    assert set(splits.values()) == {"validation"}


@pytest.mark.parametrize("task", ["rte", "glue-stsb"])
def test_prompts_are_tokenized_one_at_a_time(task):
    dataset = Dataset.from_dict(RULE[task.removeprefix("glue-")])
    tokenizer = load_tokenizer({"_target_": "smile_zoo.tiny_t5.load_tokenizer"})
    prompts, expected = GluePrompts(task, dataset, tokenizer), tokenize_glue_prompts(task, dataset, tokenizer)
    assert [prompts[index] for index in range(len(prompts))] == list(expected)
