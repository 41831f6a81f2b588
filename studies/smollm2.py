"""Measure the language benchmark: SMILE by routing and storage, other methods, and how well prompts name their task.

python -m studies.smollm2 FOLDER docs/smollm2_results.md

Rows are kept in FOLDER; a command that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from fusion_bench_smile import calibrate, choose_experts, upscale
from fusion_bench_smile.io import write_atomically
from fusion_bench_smile.nn import count_bytes
from fusion_bench_smile.reports import markdown_table
from recipes.common.packages import cached
from smile_zoo.smollm2 import (
    EXPERTS,
    KINDS,
    METRICS,
    Kind,
    Split,
    load_examples,
    load_expert,
    load_pretrained,
    load_tokenizer,
)
from smile_zoo.smollm2.task_pool import GenerationTaskPool
from studies import rivals

log = logging.getLogger(__name__)

BATCH = 50
CALIBRATION = 64  # prompts of each task
LABELLED = 300  # prompts of each task, for the probe
BLOCKS = 5  # the probe sees the hidden states before every fifth block
BY_INPUT: dict[str, Any] = {"routing_scope": "input", "top_k": 2}
RANKED: dict[str, dict[str, Any]] = {
    "8/8": {"gate_k": None, "k": 8}, "16/16, int4": {"gate_k": None, "k": 16, "storage": "int4"},
}  # fmt: skip
TITLES: dict[Kind, str] = {"full": "Full fine-tuning, four tasks", "lora": "LoRA of rank 8, eight tasks"}
PROBE = "individual models, chosen by the probe"

HEADER = f"""# Measurements of the language benchmark

Written by `python -m studies.smollm2 FOLDER docs/smollm2_results.md`: scores on the test split (200 prompts of each
task), retention relative to the individual models, in percent, and the bytes of the whole model relative to the
pretrained one in float32. *Calibrated* rows have seen {CALIBRATION} unlabelled prompts of each task. *Task known* marks
methods that are told which expert serves a prompt.
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


@dataclass(frozen=True)
class Row:
    """The measurements of one method.

    Attributes:
        scores: In percent, for each task.
        size: Bytes relative to the pretrained model.
        named: The shares of prompts whose task it names, if it names one; see `named_shares`.
    """

    scores: pd.Series
    size: float
    named: dict[str, float] | None = None


class Benchmark:
    """The rows of one kind of experts: each is measured by a method, or by the function of it that `rows` names."""

    def __init__(self, kind: Kind) -> None:
        self.kind, self.pretrained, self.tasks = kind, load_pretrained().eval(), EXPERTS[kind]
        self.experts: dict[str, nn.Module] = {task: load_expert(task, kind).eval() for task in self.tasks}

    @property
    def rows(self) -> dict[str, Callable[[], Row]]:
        """Name → how the row is measured."""
        rows = {
            "individual": lambda: Row(scores(self.experts), len(self.experts)),
            "pretrained": lambda: Row(self._scores(self.pretrained), 1),
        }
        if self.kind == "full":  # the framework's methods need 17 GB for four experts
            rows |= {name: partial(self.merged, name) for name in rivals.MERGING}
            rows["EMR-Merging, task known"] = self.emr
        for label, ranks in RANKED.items() if self.kind == "full" else [("8/8", RANKED["8/8"])]:  # LoRA has rank 8
            rows[f"token (the paper), {label}"] = partial(self.smile, **ranks)
            rows[f"input, {label}"] = partial(self.smile, **ranks, **BY_INPUT)
            rows[f"calibrated, {label}"] = partial(self.smile, calibrated=True, **ranks, **BY_INPUT)
        return rows | {"own expert, k=8, task known": self.oracle, PROBE: self.chosen_by_probe}

    def merged(self, method: str) -> Row:
        """A merging method of the framework."""
        return Row(self._scores(rivals.merged(self.pretrained, self.experts, method)), 1)

    def emr(self) -> Row:
        """EMR-Merging: an elected vector, and one bit a parameter for each task."""
        return Row(scores(rivals.emr(self.pretrained, self.experts)), 2 + len(self.experts) / 32)

    def smile(self, calibrated: bool = False, **options: Any) -> Row:
        """SMILE with some options."""
        model = upscale(self.pretrained, self.experts, **options)
        if calibrated:
            calibrate(model, {task: list(prompt_batches(task, "train", CALIBRATION)) for task in self.tasks})
        by_input = options.get("routing_scope") == "input"
        named = named_shares(weights_of_prompts(model, self.tasks)) if by_input else None
        return Row(self._scores(model), self._size(model), named)

    def oracle(self) -> Row:
        """Each expert in low rank on its own task, without a router."""
        single = {task: upscale(self.pretrained, {task: expert}, k=8) for task, expert in self.experts.items()}
        return Row(scores(single), 1 + sum(self._size(model) - 1 for model in single.values()))

    def chosen_by_probe(self) -> Row:
        """The individual models, one for each prompt, chosen by a probe of labelled prompts."""
        guessed = probe(self.pretrained, self.tasks)
        best = {task: values.argmax(dim=-1) for task, values in guessed.items()}
        return Row(scores_of_choice(self.experts, best), len(self.experts), named_shares(guessed))

    def _scores(self, model: nn.Module) -> pd.Series:
        return scores(dict.fromkeys(self.tasks, model))

    def _size(self, model: nn.Module) -> float:
        return count_bytes(model) / count_bytes(self.pretrained)


def measure(root: Path, kind: Kind) -> dict[str, Row]:
    """The rows of one kind of experts; those that are below `root` are read."""
    benchmark, results = Benchmark(kind), {}
    for name, row in benchmark.rows.items():
        file = root / kind / f"{name.replace('/', '-')}.pkl"
        file.parent.mkdir(parents=True, exist_ok=True)
        results[name] = cached(file, row)
        log.info("%s, %s: %.1f", kind, name, results[name].scores.mean())
    return results


def _table(rows: Mapping[str, Row]) -> pd.DataFrame:
    """Scores, retention and bytes of each method (rows)."""
    table = pd.DataFrame({name: row.scores for name, row in rows.items()}).T
    average = table.mean(axis=1)
    retention = 100 * average / average["individual"]
    return table.assign(average=average, retention=retention, bytes=[f"{row.size:.3f}×" for row in rows.values()])


def main() -> None:
    """Measure, and write the report into the file of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the rows that were measured")
    parser.add_argument("file", type=Path, help="file of the report, in Markdown")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    log.setLevel(logging.INFO)
    lines = [HEADER]
    for kind in KINDS:
        rows = measure(arguments.folder, kind)
        named = pd.DataFrame({name: row.named for name, row in rows.items() if row.named}).T
        lines += [f"## {TITLES[kind]}", "", markdown_table(_table(rows), 1, index=True), ""]
        lines += [NAMED, markdown_table(named, 1, index=True), ""]
        write_atomically(arguments.file, "\n".join(lines))
    print(arguments.file)


if __name__ == "__main__":
    main()
