"""Measure the shipped benchmark: every expert on every task, task vector norms, router accuracy, sizes.

python -m fusion_bench_smile.embedded.measure docs/embedded_results.md
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import CLIPModel, CLIPProcessor, CLIPVisionModel

from ..leaderboard.tables import markdown_table
from ..report import write_whole
from ..routing import record_routing
from ..upscale import upscale
from . import DATA, STRENGTHS, TASKS, Strength, load_expert, load_images, load_pretrained
from .evaluate import Classifier, accuracy, to_pixels, zero_shot_head


def arrays(task: str, split: str = "test") -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (N, 3, 28, 28) and labels (N,) of a task."""
    images = load_images(task, split)
    return to_pixels(np.stack([np.asarray(i) for i in images["image"]])), torch.tensor(images["label"])


def accuracies(models: dict[str, nn.Module], split: str = "test") -> pd.DataFrame:
    """Accuracy in percent of every model (row) on every task (column)."""
    clip = CLIPModel.from_pretrained(DATA / "clip", torch_dtype=torch.float32).eval()
    processor = CLIPProcessor.from_pretrained(DATA / "clip", use_fast=False)
    table = pd.DataFrame(index=list(models), columns=list(TASKS), dtype=float)
    for task in TASKS:
        head, (pixels, labels) = zero_shot_head(clip, processor, task), arrays(task, split)
        for name, model in models.items():
            table.loc[name, task] = 100 * accuracy(Classifier(clip, model, head), pixels, labels)
    return table


def relative_deltas(pretrained: nn.Module, expert: nn.Module) -> pd.Series:
    """‖ΔW‖ / ‖W₀‖ (Frobenius) in percent, of every linear layer."""
    values = {}
    for name, layer in pretrained.named_modules():
        if isinstance(layer, nn.Linear):
            delta = expert.get_submodule(name).weight - layer.weight
            values[name] = 100 * (delta.norm() / layer.weight.norm()).item()
    return pd.Series(values)


@torch.no_grad()
def router_accuracy(upscaled: nn.Module, split: str = "test", count: int = 200) -> pd.Series:
    """For each task, the share in percent of tokens, over all routed layers, whose top expert is the task's own."""
    shares = {}
    for number, task in enumerate(TASKS):
        with record_routing(upscaled) as routing:
            upscaled(pixel_values=arrays(task, split)[0][:count])
        shares[task] = 100 * np.mean([layer.loads[number].item() for layer in routing.values()])
    return pd.Series(shares)


def experts(strength: Strength) -> dict[str, CLIPVisionModel]:
    return {task: load_expert(task, strength).eval() for task in TASKS}


def report() -> str:
    """Everything as Markdown."""
    pretrained = load_pretrained().eval()
    lines = ["# Measurements of the embedded benchmark", ""]
    lines += [
        "Made by `python -m fusion_bench_smile.embedded.measure`; accuracies are of the test split, in percent.",
        "",
    ]
    for strength in STRENGTHS:
        models = experts(strength)
        table = accuracies({"pretrained": pretrained, **models})
        table["average"] = table.mean(axis=1)
        deltas = {task: relative_deltas(pretrained, model) for task, model in models.items()}
        norms = pd.DataFrame(
            {t: {"smallest": d.min(), "mean": d.mean(), "largest": d.max()} for t, d in deltas.items()}
        )
        routing = {
            f"gate_k={g}": router_accuracy(upscale(pretrained, models, gate_k=g, k=8).eval()) for g in (1, 4, 8, 16)
        }
        routing_table = pd.DataFrame(routing).T
        routing_table["average"] = routing_table.mean(axis=1)
        lines += [
            f"## {strength} fine-tuning",
            "",
            "Each expert (row) on each task (column):",
            "",
            to_markdown(table, 1),
            "",
        ]
        lines += [
            "Size of the task vectors, ‖ΔW‖ / ‖W₀‖ over the linear layers, in percent:",
            "",
            to_markdown(norms, 2),
            "",
        ]
        lines += ["Tokens that the router sends to their task's expert, in percent (chance: 12.5):", ""]
        lines += [to_markdown(routing_table, 1), ""]
    sizes = {p.name: sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) / 1e6 for p in sorted(DATA.iterdir())}
    sizes["total"] = sum(sizes.values())
    lines += ["## Sizes", "", "In MB:", "", to_markdown(pd.DataFrame({"size": sizes}), 1), ""]
    return "\n".join(lines)


def to_markdown(table: pd.DataFrame, digits: int, exceptions: Mapping[str, int] | None = None) -> str:
    """A table of numbers with so many decimals; some columns with others."""
    places = {column: (exceptions or {}).get(column, digits) for column in table.columns}
    text = pd.DataFrame({str(c): [f"{value:.{places[c]}f}" for value in table[c]] for c in table.columns})
    text.insert(0, "", [str(name) for name in table.index])
    return "\n".join(markdown_table(text))


def run(report: Callable[[], str], description: str | None) -> None:
    """Write a report into the file that the command line names, whole or not at all."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="where the report goes")
    file = parser.parse_args().file
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, report())
    print(file)


if __name__ == "__main__":
    run(report, __doc__)
