"""Language models in the framework's task pool for lm-eval, with a local task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import fusion_bench
from conftest import gpt2, perturbed
from lightning import Fabric
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import PreTrainedTokenizerFast

from fusion_bench_smile import SmileError, load
from fusion_bench_smile.framework.lm_eval import evaluate_with_lm_eval, task_report
from fusion_bench_smile.leaderboard import leaderboard

WORDS = [f"w{number}" for number in range(48)]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [w1, w2, w3 w4]
doc_to_target: label
target_delimiter: " "
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
POOL = """
_target_: fusion_bench.modelpool.CausalLMPool
_recursive_: false
models:
  _pretrained_: {folder}/base
  red: {folder}/red
  green: {folder}/green
model_kwargs: {{torch_dtype: float32}}
tokenizer: {folder}/base
"""


def test_metrics_have_the_names_of_lm_eval():
    results = {
        "results": {
            "gsm8k": {
                "alias": "gsm8k", "exact_match,flexible-extract": 0.5, "exact_match,strict-match": 0.25,
                "exact_match_stderr,strict-match": "N/A",
            },
            "mmlu": {"acc,none": 0.75, "acc_stderr,none": 0.01}, "mmlu_algebra": {"acc,none": 0.5},
        },
        "groups": {"mmlu": {"acc,none": 0.75}}, "n-samples": {"gsm8k": {"original": 9, "effective": 4}},
    }  # fmt: skip
    assert task_report(results, ["gsm8k", "mmlu"]) == {
        "gsm8k": {"exact_match (flexible-extract)": 0.5, "exact_match (strict-match)": 0.25, "samples": 4},
        "mmlu": {"acc": 0.75},
    }
    assert list(task_report(results, ["unknown"])) == ["gsm8k", "mmlu", "mmlu_algebra"]


class LMEvalHarnessTaskPool:
    """A pool whose harness writes nothing, as one that was interrupted."""

    tasks, output_path, fabric = "gsm8k", None, Fabric(accelerator="cpu", devices=1)

    def evaluate(self, model: nn.Module) -> None:
        assert "=" not in str(self.output_path)


def test_a_harness_without_results_is_one_line(tmp_path):
    pool = LMEvalHarnessTaskPool()
    with pytest.raises(SmileError, match="lm-eval wrote no results"):
        evaluate_with_lm_eval(pool, nn.Linear(1, 1), tmp_path / "a=1,b=2")
    assert pool.output_path is None


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<eos>", *WORDS])}
    raw = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<eos>")
    base = gpt2()
    for name, model in {"base": base, "red": perturbed(base, seed=1), "green": perturbed(base, seed=2)}.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "conf" / "modelpool").mkdir(parents=True)
    (tmp_path / "conf" / "modelpool" / "small.yaml").write_text(POOL.format(folder=tmp_path))
    for number, name in enumerate(("red", "green")):
        generator = torch.Generator().manual_seed(number)
        words = torch.randint(5, 48, (12, 4), generator=generator).tolist()
        rows = [{"question": " ".join(f"w{i}" for i in row), "label": row[0] % 3} for row in words]
        (tmp_path / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / "tasks").mkdir(exist_ok=True)
        (tmp_path / "tasks" / f"{name}.yaml").write_text(TASK.format(name=name, data=tmp_path / f"{name}.json"))
    return tmp_path


def accuracy(model: nn.Module, file: Path) -> float:
    """acc_norm: how often the choice of the largest log-likelihood per character is the right one, in percent."""
    right = []
    for row in map(json.loads, file.read_text().splitlines()):
        question = [int(word[1:]) + 2 for word in row["question"].split()]
        scores = []
        for choice, length in (([3], 2), ([4], 2), ([5, 6], 5)):  # w1, w2, w3 w4
            logits = model(torch.tensor([question + choice])).logits[0, len(question) - 1 : -1].log_softmax(-1)
            scores.append(float(logits.gather(1, torch.tensor(choice)[:, None]).sum()) / length)
        right.append(scores.index(max(scores)) == row["label"])
    return 100 * sum(right) / len(right)


@pytest.mark.cli
@torch.no_grad()
def test_tasks_of_lm_eval_are_columns_of_the_leaderboard(workplace):
    pytest.importorskip("lm_eval")
    completed = fusion_bench(
        "--config-dir", str(workplace / "conf"), "+experiment=smile_run", "method=smile_upscaling", "modelpool=small",
        "method.k=4", "method.gate_k=2", f"method.model_path={workplace}/smile",
        "taskpool=LMEvalHarnessTaskPool/lm_eval", "taskpool.tasks=[red,green]",
        f"taskpool.include_path={workplace}/tasks", "fabric.accelerator=cpu", cwd=workplace,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr[-3000:]
    (board,), _ = leaderboard([workplace / "outputs"])
    assert board.tasks == ["red", "green"]
    model = load(workplace / "smile").eval()
    row = board.table.iloc[0]
    for task in ("red", "green"):
        assert row[task] == pytest.approx(accuracy(model, workplace / f"{task}.json"))
    assert len(list((workplace / "outputs").rglob("lm_eval_results/results_*.json"))) == 1
