"""Measure the text benchmark: accuracy by ranks, oracle routing, and statistics of the routers.

python -m studies.text docs/embedded_text_results.md
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import get_args

import pandas as pd
import torch
from torch import Tensor, nn

from fusion_bench_smile import calibrate, upscale
from fusion_bench_smile.nn import RoutingEvent, count_bytes, count_parameters, layers_with_router, observe_routing
from fusion_bench_smile.reports import markdown_table
from smile_zoo.text import (
    DATA,
    TASKS,
    Kind,
    Split,
    load_expert,
    load_head,
    load_pretrained,
    load_texts,
    load_tokenizer,
)
from smile_zoo.text.evaluate import accuracy, arrays
from smile_zoo.text.task_pool import tokenize_batch
from studies import rivals
from studies.images import run, size_section

RANKS = ((1, 8), (4, 8), (8, 8), (16, 16))  # gate_k, k
ORACLE_RANKS = (8, 16)
BY_INPUT = {
    "8/8": {"gate_k": None, "k": 8}, "16/16, int4": {"gate_k": None, "k": 16, "storage": "int4"},
    "8 rows, 2 % of the entries, int4": {"gate_k": 8, "k": -1, "density": 0.02, "storage": "int4"},
}  # fmt: skip
CALIBRATION = 64  # inputs of each task
TEXTS_PER_TASK = 150  # for the statistics of routers
STATISTICS = """\
Router statistics on tokens of the test split: energies of a token on the router rows of its task's expert and of the
other experts, relative to random rows; router accuracy, and load of the most frequent expert of a layer, in percent of
the tokens (chance: 12.5):"""

OTHERS = """\
Other methods of the framework, and SMILE with one choice of two experts for each text, zero-shot and calibrated by 64
unlabelled texts of each task. Bytes are relative to the pretrained model in float32:"""


def accuracies(models: Mapping[str, nn.Module], kind: Kind, split: Split = "test") -> pd.Series:
    """Accuracy in percent on every task, with the head of its expert.

    Args:
        models: Task → model.
        kind: Kind of the experts.
        split: The split of the texts.
    """
    tokenizer = load_tokenizer()
    values = {}
    for task, model in models.items():
        values[task] = accuracy(model, tokenizer, load_head(task, kind), *arrays(load_texts(task, split), task))
    return pd.Series(values)


@torch.inference_mode()
def router_statistics(model: nn.Module, texts: int = TEXTS_PER_TASK) -> pd.Series:
    """Statistics of the routers of an upscaled encoder on tokens without padding: means over routed layers and tasks.

    Args:
        model: Routed token by token, with the tasks' experts in the order of `TASKS`.
        texts: Number of texts of each task.

    Returns:
        ``energy, right expert`` and ``energy, other experts``: energy of a token on the router rows of its task's
        expert, and on those of the others, relative to random rows: ‖V_gate x‖² / ‖x‖² · in / gate_k. With 1, the rows
        are unrelated to the inputs.
        ``router accuracy``: share of tokens with their task's expert in first place, in percent.
        ``largest load``: share of the tokens of all tasks that the most frequent expert of a layer gets, in percent.
    """
    tokenizer = load_tokenizer()
    energies, loads = [], []  # for each task (layers, experts)
    for task in TASKS:
        batch = tokenize_batch(tokenizer, arrays(load_texts(task), task)[0][:texts])
        layers = _layer_statistics(model, batch)
        energies.append(torch.stack([energy for energy, _ in layers]))
        loads.append(torch.stack([load for _, load in layers]))
    energy, load = torch.stack(energies), torch.stack(loads)  # (tasks, layers, experts)
    is_right = torch.eye(len(TASKS), dtype=torch.bool)[:, None].expand_as(energy)
    return pd.Series(
        {
            "energy, right expert": energy[is_right].mean().item(),
            "energy, other experts": energy[~is_right].mean().item(),
            "router accuracy": 100 * load[is_right].mean().item(),
            "largest load": 100 * load.mean(0).amax(-1).mean().item(),
        }
    )


def _layer_statistics(model: nn.Module, batch: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """For each routed layer the energy on each expert's router rows, and each expert's load; both (T,)."""
    layers, statistics = layers_with_router(model), []
    is_token = batch["attention_mask"].bool()

    def record(name: str, event: RoutingEvent) -> None:
        x, scores = event.inputs[is_token], event.scores[is_token]  # (tokens, in), (tokens, T)
        gate_ranks = torch.tensor(layers[name].layout.gate_ranks).clamp(min=1)
        energy = scores.square().sum(0) / x.square().sum() * x.shape[-1] / gate_ranks
        statistics.append((energy, scores.argmax(dim=-1).bincount(minlength=len(gate_ranks)) / len(x)))

    with observe_routing(model, record):
        model(**batch)
    return statistics


def measure(kind: Kind) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure one kind of experts.

    Returns:
        Accuracies, retention and parameter ratio of each model (rows), and the router statistics of each gate_k (rows).
    """
    pretrained = load_pretrained().eval()
    experts = {task: load_expert(task, kind).eval() for task in TASKS}
    results = {
        "individual": (accuracies(experts, kind), sum(map(count_parameters, experts.values()))),
        "pretrained": (accuracies(dict.fromkeys(TASKS, pretrained), kind), count_parameters(pretrained)),
    }
    statistics = {}
    for gate_k, k in RANKS:
        model = upscale(pretrained, experts, gate_k=gate_k, k=k).eval()
        name = f"SMILE (gate_k={gate_k}, k={k})"
        results[name] = accuracies(dict.fromkeys(TASKS, model), kind), count_parameters(model)
        statistics[f"gate_k={gate_k}"] = router_statistics(model)
    for k in ORACLE_RANKS:
        single = {task: upscale(pretrained, {task: expert}, k=k).eval() for task, expert in experts.items()}
        parameters = count_parameters(upscale(pretrained, experts, gate_k=k, k=k))
        results[f"oracle routing (k={k})"] = accuracies(single, kind), parameters
    table = pd.DataFrame({name: values for name, (values, _) in results.items()}).T
    average = table.mean(axis=1)
    ratios = [parameters / count_parameters(pretrained) for _, parameters in results.values()]
    table = table.assign(average=average, retention=100 * average / average["individual"], parameters=ratios)
    return table, pd.DataFrame(statistics).T


def other_methods(kind: Kind) -> pd.DataFrame:
    """SMILE by input and other methods: accuracies, retention, and bytes relative to the pretrained model's (rows)."""
    pretrained = load_pretrained().eval()
    experts = {task: load_expert(task, kind).eval() for task in TASKS}
    individual, tokenizer = accuracies(experts, kind), load_tokenizer()
    results: dict[str, tuple[pd.Series, float]] = {}
    for name in rivals.MERGING:
        model = rivals.merged(pretrained, experts, name)
        results[name] = accuracies(dict.fromkeys(TASKS, model), kind), 1.0
    bits = len(experts) / 8  # bytes of EMR's masks for each parameter, beside an elected vector
    results["EMR-Merging (task known)"] = accuracies(rivals.emr(pretrained, experts), kind), 2 + bits / 4
    for label, ranks in BY_INPUT.items():
        for calibration in (0, CALIBRATION):
            model = upscale(pretrained, experts, routing_scope="input", top_k=2, **ranks).eval()  # type: ignore[arg-type]
            if calibration:
                texts = {task: arrays(load_texts(task, "train"), task)[0][:calibration] for task in TASKS}
                calibrate(model, {task: [tokenize_batch(tokenizer, chosen)] for task, chosen in texts.items()})
            size = count_bytes(model) / count_bytes(pretrained)
            name = f"{'calibrated' if calibration else 'input'}, {label}"
            results[name] = accuracies(dict.fromkeys(TASKS, model), kind), size
    table = pd.DataFrame({name: values for name, (values, _) in results.items()}).T
    average = table.mean(axis=1)
    sizes = [size for _, size in results.values()]
    return table.assign(average=average, retention=100 * average / individual.mean(), bytes=sizes)


def report() -> str:
    """All measurements as Markdown."""
    lines = [
        "# Measurements of the text benchmark",
        "",
        "Written by `python -m studies.text docs/embedded_text_results.md`. Accuracies are of the test split, in",
        "percent. Oracle routing serves every token by the expert of its task.",
        "",
    ]
    for kind in get_args(Kind):
        lines += _kind_section(kind)
    return "\n".join([*lines, *size_section(DATA), ""])


def _kind_section(kind: Kind) -> Iterator[str]:
    table, statistics = measure(kind)
    yield from [f"## {kind} fine-tuning", "", markdown_table(table, {"parameters": 3}, index=True), ""]
    yield from [*STATISTICS.splitlines(), "", markdown_table(statistics, 2, index=True), ""]
    yield from [*OTHERS.splitlines(), "", markdown_table(other_methods(kind), {"bytes": 3}, index=True), ""]


if __name__ == "__main__":
    run(report, __doc__)
