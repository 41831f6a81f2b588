"""Measure the language benchmark: SMILE by routing and storage, other methods, and how well prompts name their task.

python -m studies.smollm2 docs/smollm2_results.md
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from fusion_bench_smile import calibrate, choose_experts, upscale
from fusion_bench_smile.nn import count_bytes
from fusion_bench_smile.reports import markdown_table
from smile_zoo.smollm2 import EXPERTS, METRICS, Kind, Split, load_examples, load_expert, load_pretrained, load_tokenizer
from smile_zoo.smollm2.task_pool import GenerationTaskPool
from studies import rivals
from studies.images import run

log = logging.getLogger(__name__)

BATCH = 50
CALIBRATION = 64  # prompts of each task
LABELLED = 300  # prompts of each task, for the probe
BLOCKS = 5  # the probe sees the hidden states before every fifth block
BY_INPUT: dict[str, Any] = {"routing_scope": "input", "top_k": 2}
RANKED: dict[str, dict[str, Any]] = {
    "8/8": {"gate_k": None, "k": 8}, "16/16, int4": {"gate_k": None, "k": 16, "storage": "int4"},
    "8 rows, 2 % of the entries, int4": {"gate_k": 8, "k": -1, "density": 0.02, "storage": "int4"},
}  # fmt: skip

HEADER = f"""# Measurements of the language benchmark

Written by `python -m studies.smollm2 docs/smollm2_results.md`: scores on the test split (200 prompts of each task),
retention relative to the individual models, in percent, and the bytes of the whole model relative to the pretrained
one in float32. *Calibrated* rows have seen {CALIBRATION} unlabelled prompts of each task. *Task known* marks methods
that are told which expert serves a prompt.
"""
NAMED = f"""\
How well a prompt names its task: the share of prompts, in percent, whose task comes first, and is among the first two.
The *probe* is a logistic regression on the pretrained model's hidden states (mean over the tokens, every fifth block),
fitted to {LABELLED} labelled prompts of each task: an estimate of what the prompts themselves allow.
"""

# -- evaluation


@cache
def examples(task: str) -> Dataset:
    """The test examples of a task."""
    return load_examples(task, "test")


def scores(models: Mapping[str, nn.Module]) -> pd.Series:
    """The score in percent on each task, of its model."""
    return pd.Series({task: _score(task, model, examples(task)) for task, model in models.items()})


def scores_of_choice(experts: Mapping[str, nn.Module], chosen: Mapping[str, Tensor]) -> pd.Series:
    """The scores if one expert serves each prompt: task → the index of the expert for each of its prompts, (N,)."""
    values = dict.fromkeys(chosen, 0.0)
    for task, indices in chosen.items():
        for index, expert in enumerate(experts.values()):
            if len(served := (indices == index).nonzero()[:, 0].tolist()):
                part = _score(task, expert, examples(task).select(served))
                values[task] += part * len(served) / len(indices)
    return pd.Series(values)


def _score(task: str, model: nn.Module, dataset: Dataset) -> float:
    tasks = {task: {"dataset": dataset, "metric": METRICS[task]}}
    pool = GenerationTaskPool(load_tokenizer(), tasks, batch_size=BATCH)
    return 100 * float(pool.evaluate(model.eval())["average"]["score"])


# -- which expert a prompt names


def prompt_batches(task: str, split: Split, count: int) -> Iterator[dict[str, Tensor]]:
    """The first prompts of a task in their order, tokenized in batches."""
    tokenizer = load_tokenizer()
    prompts = list(load_examples(task, split)["prompt"])[:count]
    for start in range(0, len(prompts), BATCH):
        tokens = tokenizer(prompts[start : start + BATCH], padding=True, padding_side="left", return_tensors="pt")
        yield {name: tokens[name] for name in ("input_ids", "attention_mask")}


@torch.inference_mode()
def weights_of_prompts(model: nn.Module, tasks: tuple[str, ...]) -> dict[str, Tensor]:
    """Task → the weights that a model routed by input gives the experts for each prompt, (N, T)."""
    return {task: torch.cat([choose_experts(model, **batch) for batch in prompt_batches(task, "test", 200)])
            for task in tasks}  # fmt: skip


@torch.inference_mode()
def probe(pretrained: nn.Module, tasks: tuple[str, ...]) -> dict[str, Tensor]:
    """Task → the probabilities of the tasks for each prompt, (N, T), by a probe that was fitted to labelled prompts."""

    def features(task: str, split: Split, count: int) -> Tensor:
        return torch.cat([_mean_states(pretrained, batch) for batch in prompt_batches(task, split, count)])

    train = [features(task, "train", LABELLED) for task in tasks]
    labels = torch.arange(len(tasks)).repeat_interleave(torch.tensor([len(values) for values in train]))
    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.003, max_iter=500))
    fitted.fit(torch.cat(train).numpy(), labels.numpy())
    return {task: torch.from_numpy(fitted.predict_proba(features(task, "test", 200).numpy())) for task in tasks}


def _mean_states(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean hidden states of prompts before every fifth block, side by side: (B, blocks·hidden)."""
    states = model.model(**batch, output_hidden_states=True).hidden_states[::BLOCKS]  # type: ignore[operator]
    counted = batch["attention_mask"][..., None].float()
    return torch.cat([(state * counted).sum(1) / counted.sum(1) for state in states], dim=-1)


def named_shares(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """The shares of prompts whose task has the largest weight, and one of the two largest, in percent."""
    first, two = [], []
    for index, values in enumerate(weights.values()):
        order = values.argsort(dim=-1, descending=True, stable=True)
        first.append((order[:, 0] == index).float().mean().item())
        two.append((order[:, :2] == index).any(dim=-1).float().mean().item())
    return {"first": 100 * sum(first) / len(first), "first two": 100 * sum(two) / len(two)}


# -- the tables


def measure(kind: Kind) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores, retention and bytes of each method (rows), and how well prompts name their task (rows)."""
    pretrained, tasks = load_pretrained().eval(), EXPERTS[kind]
    experts: dict[str, nn.Module] = {task: load_expert(task, kind).eval() for task in tasks}
    table: dict[str, tuple[pd.Series, float]] = {}
    named: dict[str, dict[str, float]] = {}

    def add(name: str, values: pd.Series, size: float) -> None:
        table[name] = values, size
        log.info("%s, %s: %.1f", kind, name, values.mean())

    def size(model: nn.Module) -> float:
        return count_bytes(model) / count_bytes(pretrained)

    def score(model: nn.Module) -> pd.Series:
        return scores(dict.fromkeys(tasks, model))

    add("individual", scores(experts), len(experts))
    add("pretrained", score(pretrained), 1)
    if kind == "full":  # the framework's methods need 17 GB for four experts
        for method in rivals.MERGING:
            add(method, score(rivals.merged(pretrained, experts, method)), 1)
        masks = 2 + len(experts) / 32  # an elected vector, and one bit a parameter for each task
        add("EMR-Merging, task known", scores(rivals.emr(pretrained, experts)), masks)
    for label in ("8/8", "16/16, int4"):
        model = upscale(pretrained, experts, **RANKED[label])
        add(f"token (the paper), {label}", score(model), size(model))
    for label, ranks in RANKED.items():
        model = upscale(pretrained, experts, **ranks, **BY_INPUT)
        add(f"input, {label}", score(model), size(model))
        named[f"input, {label}"] = named_shares(weights_of_prompts(model, tasks))
        calibrate(model, {task: list(prompt_batches(task, "train", CALIBRATION)) for task in tasks})
        add(f"calibrated, {label}", score(model), size(model))
        named[f"calibrated, {label}"] = named_shares(weights_of_prompts(model, tasks))
    single = {task: upscale(pretrained, {task: expert}, k=8) for task, expert in experts.items()}
    add("own expert, k=8, task known", scores(single), 1 + sum(size(model) - 1 for model in single.values()))
    guessed = probe(pretrained, tasks)
    named["probe"] = named_shares(guessed)
    best = {task: values.argmax(dim=-1) for task, values in guessed.items()}
    add("individual models, chosen by the probe", scores_of_choice(experts, best), len(experts))
    return _with_retention(table), pd.DataFrame(named).T


def _with_retention(rows: Mapping[str, tuple[pd.Series, float]]) -> pd.DataFrame:
    table = pd.DataFrame({name: values for name, (values, _) in rows.items()}).T
    average = table.mean(axis=1)
    retention = 100 * average / average["individual"]
    return table.assign(average=average, retention=retention, bytes=[f"{size:.3f}×" for _, size in rows.values()])


def report() -> str:
    """All measurements as Markdown."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    log.setLevel(logging.INFO)
    lines = [HEADER]
    for kind, title in (("full", "Full fine-tuning, four tasks"), ("lora", "LoRA, eight tasks")):
        table, named = measure(kind)  # type: ignore[arg-type]
        lines += [f"## {title}", "", markdown_table(table, 1, index=True), ""]
        lines += [NAMED, markdown_table(named, 1, index=True), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    run(report, __doc__)
